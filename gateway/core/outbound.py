"""The life of a call that an app makes to the outside, in flow order, without I/O.

    identify ─ decide ─ INTENT ─ outside ─ OUTCOME ─ release

A call comes as a generator of commands, as in `gateway.core.exchange`; the frontend that stands on
the way out (`gateway.frontends.intercept`) drives it. It never raises. Whatever goes wrong ends in
an outcome in the log, if an intent is there, and in an answer that carries nothing from outside.
No byte leaves before `RecordIntent` was answered with `Recorded`, and none comes back before
`RecordOutcome` was answered with `DONE`.

Most calls come through a tunnel (CONNECT, RFC 9110 section 9.3.6). Opening one has no effect of its
own: `open_tunnel` only says who calls and where to, and each request inside is a call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Literal

from audit.recorder import Act, Begun, End, Who
from gateway.core import answers
from gateway.core.answers import Refusal
from gateway.core.commands import (
    Answer,
    CloseUpstream,
    Command,
    EndResponse,
    Failed,
    Receive,
    ReceiveHead,
    ReceiveUpstream,
    Recorded,
    RecordIntent,
    RecordOutcome,
    Release,
    Respond,
    SendUpstream,
    Signal,
    StartResponse,
)
from gateway.core.enforcement import Reply, unavailable, upstream_failure
from gateway.core.exchange import Summary
from gateway.core.headers import check_request, clean_request, clean_response, is_upgrade
from gateway.core.messages import RequestHead, ResponseHead
from gateway.errors import (
    BadRequestError,
    GatewayError,
    UnavailableError,
    UnsupportedError,
    UpstreamContentError,
    UpstreamError,
)
from gateway.identity.model import Identified, NotIdentified
from gateway.outbound.listing import Listed, Listing, Target, parse_authority
from policies import model
from policies.model import Allowed, Decision, Denied
from policies.obligations import Review
from policies.store import InForce

#: What the log and the rules call all of this.
SERVICE = "outbound"
_TYPE = "Destination"
#: Nothing is done to what passes, so that an allowance may only ask for a later review.
_ENFORCEABLE: frozenset[type] = frozenset({Review})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PORTS = {"https": 443, "http": 80}
_BARE_LABELS = 2
_SHORT_LABEL = 3
_LONGEST_LOGGED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifyApp:
    """Find out which app calls. Answer: `Identified`, `NotIdentified` or `Failed`."""

    credentials: str | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOutside:
    """Begin the request whose body, if any, follows in pieces. Answer: `Signal.DONE` or `Failed`.

    After it come `SendUpstream`, `ReceiveHead` and `ReceiveUpstream`, as after `OpenUpstream`.
    """

    target: Target
    head: RequestHead
    has_body: bool


type OutboundCommand = Command | IdentifyApp | OpenOutside
type Steps[T] = Generator[OutboundCommand, Answer, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What stays the same from one call to the next. `clock` is Unix time in seconds."""

    tenant: str
    listing: Listing
    in_force: Callable[[], InForce]
    max_body_bytes: int
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """What was agreed when a tunnel was opened; nothing in it is permitted by that alone."""

    app: Identified
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a request reached us.

    `server_name` is the SNI of the app's TLS handshake, `encrypted` whether the request will go on
    over TLS whose certificate is verified.
    """

    encrypted: bool
    tunnel: Tunnel | None = None
    server_name: str | None = None


def open_tunnel(head: RequestHead, outside: Outside, *, request: str) -> Steps[Tunnel | None]:
    """Say whether an app may open a tunnel to `head.authority`; if not, `Respond` was yielded."""
    call = _Call(head, outside, Way(encrypted=True), request)
    yield from call.run(call.agree())
    return call.tunnel


def call(head: RequestHead, way: Way, outside: Outside, *, request: str) -> Steps[Summary]:
    """Carry one call through. `request` is the id under which the app's makers may ask about it."""
    state = _Call(head, outside, way, request)
    yield from state.run(state.attempt())
    return state.summary()


@dataclass(slots=True)
class _Call:
    """The state of one call. What changes it stands in this class."""

    head: RequestHead
    outside: Outside
    way: Way
    request: str
    started: float = field(init=False)
    app: Identified | None = None
    target: Target | None = None
    listed: Listed = field(default_factory=Listed)
    decision: Decision | None = None
    begun: Begun | None = None
    tunnel: Tunnel | None = None
    bytes_in: int = 0
    ended: bool = False
    opened: bool = False
    answering: bool = False
    status: int = 0
    failure: str | None = None
    mistake: str | None = None

    def __post_init__(self) -> None:
        self.started = self.outside.clock()

    def run(self, steps: Steps[None]) -> Steps[None]:
        try:
            yield from steps
        except GatewayError as error:
            yield from self._fail(error.code, _refusal(error))
        except Exception as error:  # noqa: BLE001 - whatever went wrong, nothing passes
            detail = "The gateway made a mistake and let nothing pass. Tell the operator."
            self.mistake = type(error).__name__
            yield from self._fail("gateway.bug", Refusal(status=500, detail=detail))

    # --- In order -----------------------------------------------------------------------------

    def agree(self) -> Steps[None]:
        """Identify and decide, for a tunnel."""
        host, port = parse_authority(self.head.authority, default_port=None)
        self.target = Target(host=host, port=port, encrypted=True)
        app = yield from self._identified()
        if app is not None and (yield from self._allowed(app)):
            self.tunnel = Tunnel(app=app, host=host, port=port)

    def attempt(self) -> Steps[None]:
        """The whole call."""
        app = yield from self._identified()
        if app is None:
            return
        try:
            self.target = _agreed_target(self.head, self.way)
        except BadRequestError as error:
            yield from self._deny(_refusal(error), "gateway.destination_unclear")
            return
        if not (yield from self._allowed(app)):
            return
        # That `Host` and target are one was checked in every spelling that can be meant.
        named = self.head.headers.get("host") or self.head.authority
        check_request(replace(self.head, authority=named))
        if is_upgrade(self.head):
            raise UnsupportedError("Upgrades (WebSocket, h2c) do not leave from here.", status=501)
        if self.head.method not in _METHODS:
            raise UnsupportedError("This method does not leave from here.", status=405)
        length = _length(self.head.headers.get("content-length"))
        if length is not None and length > self.outside.max_body_bytes:
            raise self._too_large()
        yield from self._begin(self._act("allow"))
        yield from self._pass(self.target, has_body=_has_body(self.head, length))

    def _identified(self) -> Steps[Identified | None]:
        if self.way.tunnel is not None:
            self.app = self.way.tunnel.app
            return self.app
        answer = yield IdentifyApp(credentials=self.head.headers.get("proxy-authorization"))
        if isinstance(answer, Identified):
            self.app = answer
            return answer
        if not isinstance(answer, NotIdentified):
            raise unavailable(answer)
        detail = (
            "The name and key in the proxy's address are not those of an app."
            if answer.credentials_given
            else "An app shows itself by name and key in its proxy's address."
        )
        headers = (("proxy-authenticate", answer.challenge),)
        yield from self._deny(Refusal(status=407, detail=detail, headers=headers), answer.reason)
        return None

    def _allowed(self, app: Identified) -> Steps[bool]:
        if self.target is None:
            raise RuntimeError("Nothing is decided before it is known where a call goes.")
        self.listed = self.outside.listing.look_up(
            app.principal.id, self.target.host, self.target.port
        )
        self.decision = self._decide(app, self.target)
        if isinstance(self.decision, Allowed):
            return True
        denied = self.decision
        refusal = answers.for_denial(denied, hide=False)
        if denied.failure is None and not self.listed.purposes:
            detail = (
                f"{self.target.host}:{self.target.port} is not on the list of hosts that this app "
                "may call. The operator can add it to gateway.outbound.destinations."
            )
            refusal = replace(refusal, detail=detail)
        yield from self._deny(refusal, denied.failure or denied.remedy.kind)
        return False

    def _decide(self, app: Identified, target: Target) -> Decision:
        request = model.Request(
            principal=app.principal,
            action="connect",
            resource=model.Resource(
                service=SERVICE,
                kind="outbound",
                type=_TYPE,
                destination=model.Destination(
                    host=target.host,
                    listed_for=self.listed.purposes,
                    encrypted=target.encrypted,
                ),
            ),
            context=model.Context(purpose=app.purpose, now=self.started, client=app.client),
        )
        return self.outside.in_force().engine.decide(request, enforceable=_ENFORCEABLE)

    def _pass(self, target: Target, *, has_body: bool) -> Steps[None]:
        opened = yield OpenOutside(
            target=target, head=clean_request(self.head, forwarded=False), has_body=has_body
        )
        if opened is not Signal.DONE:
            raise upstream_failure(opened)
        # Whoever fails from here on closes it.
        self.opened = True
        if has_body and not (yield from self._upload()):
            return
        answer = yield ReceiveHead()
        if not isinstance(answer, ResponseHead):
            raise upstream_failure(answer)
        length = _length(answer.headers.get("content-length"))
        if answer.status < HTTPStatus.OK:
            raise UpstreamError("The host outside wants to speak another protocol.")
        if self.head.method != "HEAD" and length is not None and length > self._most:
            raise UpstreamContentError("The answer from outside is larger than may pass here.")
        released = _released(answer)
        yield from self._record_end(
            "success" if answer.status < HTTPStatus.BAD_REQUEST else "failed",
            status=answer.status,
            bytes_out=length,
        )
        self.answering = True
        if (yield StartResponse(head=released)) is Signal.GONE:
            self.failure = "gateway.client_gone"
        else:
            yield from self._download()
        self.opened = False
        yield CloseUpstream()

    @property
    def _most(self) -> int:
        return self.outside.max_body_bytes

    def _upload(self) -> Steps[bool]:
        """Pass the body on; False if the app went away, which is then in the log."""
        while True:
            piece = yield Receive()
            if piece is Signal.GONE:
                self.failure = "gateway.client_gone"
                self.opened = False
                yield CloseUpstream()
                yield from self._record_end("aborted", status=499)
                return False
            if not isinstance(piece, bytes):
                break
            self.bytes_in += len(piece)
            if self.bytes_in > self._most:
                raise self._too_large()
            answer = yield SendUpstream(data=piece)
            if answer is Signal.END:
                return True
            if answer is not Signal.DONE:
                raise upstream_failure(answer)
        if piece is not Signal.END:
            raise upstream_failure(piece)
        answer = yield SendUpstream(data=None)
        if answer not in (Signal.DONE, Signal.END):
            raise upstream_failure(answer)
        return True

    def _download(self) -> Steps[None]:
        received = 0
        while True:
            piece = yield ReceiveUpstream()
            if piece is Signal.END:
                yield EndResponse()
                return
            if not isinstance(piece, bytes):
                self.failure = piece.code if isinstance(piece, Failed) else "gateway.internal"
                yield EndResponse(broken=True)
                return
            received += len(piece)
            if received > self._most:
                self.failure = "gateway.answer_too_large"
                yield EndResponse(broken=True)
                return
            if (yield Release(data=piece)) is Signal.GONE:
                self.failure = "gateway.client_gone"
                return

    # --- The log ------------------------------------------------------------------------------

    def _begin(self, act: Act) -> Steps[None]:
        answer = yield RecordIntent(act=act)
        if not isinstance(answer, Recorded):
            raise unavailable(answer)
        self.begun = answer.begun

    def _record_end(
        self,
        outcome: Literal["success", "denied", "failed", "aborted"],
        *,
        status: int,
        reason: str | None = None,
        bytes_out: int | None = None,
    ) -> Steps[None]:
        """Write the outcome. Raises `UnavailableError` if it is not durable."""
        if self.begun is None or self.ended:
            raise RuntimeError("A call ends once, after it began.")
        # Whatever comes of it, no second outcome is written.
        self.ended = True
        self.status = status
        end = End(
            outcome=outcome,
            status=status,
            reason=reason,
            bytes_in=self.bytes_in,
            bytes_out=bytes_out,
            duration_us=max(0, int((self.outside.clock() - self.started) * 1_000_000)),
        )
        answer = yield RecordOutcome(begun=self.begun, end=end)
        if answer is not Signal.DONE:
            raise unavailable(answer)

    def _act(self, decision: Literal["allow", "deny"], *, reason: str | None = None) -> Act:
        allowed = self.decision if isinstance(self.decision, Allowed) else None
        obligations = allowed.obligations if allowed else ()
        return Act(
            tenant=self.outside.tenant,
            who=Who(kind="service", name=self.app.person, role="app", address=self.head.client)
            if self.app
            else Who(kind="anonymous", address=self.head.client),
            action="connect",
            service=SERVICE,
            purpose=self.app.purpose if self.app else None,
            resources=(_TYPE,),
            decision=decision,
            rules=tuple(sorted(self.decision.rules)) if self.decision else (),
            obligations=("review",) if obligations else (),
            reason=reason,
            details={"kind": SERVICE} | self._where(),
        )

    def _where(self) -> dict[str, str]:
        """Where to, as far as the log may know: never a path, a query or a name made up by an app.

        Below a wildcard, and of hosts on no list, an app can say anything in the first labels of a
        name; only the last ones are kept, which say whose host it is.
        """
        if self.target is None:
            return {}
        host = self.target.host
        if not self.listed.exact and ":" not in host and not host.replace(".", "").isdecimal():
            labels = host.split(".")
            short = len(labels) > _BARE_LABELS and len(labels[-2]) <= _SHORT_LABEL
            host = ".".join(labels[-_BARE_LABELS - short :])
        port = str(self.target.port)
        usable = host[:1].isalnum() and len(host) <= _LONGEST_LOGGED and not host.startswith("eyj")
        return {"host": host, "port": port} if usable else {"port": port}

    # --- What goes wrong ----------------------------------------------------------------------

    def _deny(self, refusal: Refusal, reason: str) -> Steps[None]:
        """No: into the log first, then to the app."""
        try:
            yield from self._begin(self._act("deny", reason=reason))
            yield from self._record_end("denied", status=refusal.status, reason=reason)
        except UnavailableError as error:
            refusal, self.failure = _refusal(error), error.code
        yield from self._send(refusal)

    def _fail(self, code: str, refusal: Refusal) -> Steps[None]:
        """Close what is open: towards the outside, in the log, and towards the app."""
        self.failure = code
        if self.opened:
            self.opened = False
            yield CloseUpstream()
        if self.begun is not None and not self.ended:
            try:
                yield from self._record_end("failed", status=refusal.status, reason=code)
            except UnavailableError as error:
                refusal = _refusal(error)
        if self.answering:
            yield EndResponse(broken=True)
            return
        yield from self._send(refusal)

    def _send(self, refusal: Refusal) -> Steps[None]:
        self.answering, self.status = True, refusal.status
        number = self.begun.request if self.begun else self.request
        reply = refused(refusal, self.head, number)
        yield Respond(head=reply.head, body=reply.body)

    def _too_large(self) -> BadRequestError:
        return BadRequestError(
            f"A body that leaves from here may have {self._most} bytes.", status=413
        )

    def summary(self) -> Summary:
        """What metrics may know."""
        decided: Literal["allow", "deny", "none"] = "none"
        if self.decision is not None:
            decided = "deny" if isinstance(self.decision, Denied) else "allow"
        return Summary(
            service=SERVICE,
            action="connect",
            status=self.status,
            decision=decided,
            failure=self.failure,
            mistake=self.mistake,
        )


def refused(refusal: Refusal, head: RequestHead, number: str) -> Reply:
    """The answer of the gateway itself to an app: problem details (RFC 9457)."""
    return answers.write(refusal, form="problem", head=head, request=number)


def _agreed_target(head: RequestHead, way: Way) -> Target:
    """Where a request goes, if everything that says so says the same.

    Tunnel, SNI (RFC 6066 section 3), the request's own target and `Host` (RFC 9112 section 3.2) are
    read by different parts of the way; a request that names two hosts is one to the wrong host.
    """
    default = _PORTS["https" if way.encrypted else "http"]
    named = {parse_authority(head.authority, default_port=default)}
    named |= {parse_authority(one, default_port=default) for one in head.headers.all("host")}
    if way.tunnel is not None:
        named.add((way.tunnel.host, way.tunnel.port))
    if way.server_name is not None:
        named |= {(parse_authority(way.server_name, default_port=default)[0], p) for _, p in named}
    if len(named) != 1 or (way.tunnel is not None and (head.scheme == "https") != way.encrypted):
        raise BadRequestError(
            "The tunnel, the TLS server name, the request's target and its Host header must name "
            "one and the same host and port.",
            status=421,
        )
    host, port = named.pop()
    return Target(host=host, port=port, encrypted=way.encrypted)


def _released(head: ResponseHead) -> ResponseHead:
    cleaned = clean_response(head)
    # That one is about the connection to the gateway's own name.
    return replace(cleaned, headers=cleaned.headers.without({"strict-transport-security"}))


def _length(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None


def _has_body(head: RequestHead, length: int | None) -> bool:
    return bool(length) or head.headers.get("transfer-encoding") is not None


def _refusal(error: GatewayError) -> Refusal:
    match error:
        case BadRequestError(status=status):
            return Refusal(status=status, detail=str(error))
        case UnavailableError():
            detail = "Something that is needed is not available now. Nothing was let out."
            return Refusal(status=503, detail=detail, headers=(("retry-after", "5"),))
    status = getattr(error, "status", 500)
    detail = (
        "The host outside did not answer in time. Whether it did what was asked is not known."
        if status == HTTPStatus.GATEWAY_TIMEOUT
        else "The host outside cannot be reached, cannot be trusted, or broke off."
    )
    return Refusal(status=status, detail=detail)
