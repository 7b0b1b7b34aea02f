"""The life of one request, in flow order, without I/O.

    identify ─ plan ─ (know, ask) ─ INTENT ─ app ─ (know, ask per record) ─ OUTCOME ─ release

`exchange` is a generator of commands (`gateway.core.commands`). It never raises: whatever goes
wrong ends in an outcome in the log, if an intent is there, and in an answer that carries nothing of
the app's. Nothing is sent to the client before `RecordOutcome` was answered with `DONE`, but for
answers that refuse before anything was begun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Literal

from gateway.core import answers
from gateway.core.answers import Refusal
from gateway.core.commands import (
    AnswerOwn,
    CloseUpstream,
    EndResponse,
    Failed,
    Fetched,
    Identify,
    OpenUpstream,
    Receive,
    ReceiveAll,
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
from gateway.core.enforcement import (
    Enforcement,
    RefusedError,
    Reply,
    Sealer,
    Steps,
    unavailable,
    upstream_failure,
)
from gateway.core.entries import Trail
from gateway.core.handler import Handler, Streamed
from gateway.core.headers import (
    asked_each_time,
    check_request,
    clean_request,
    clean_response,
    is_service_worker,
    is_upgrade,
    never_stored,
)
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.core.recheck import Ended, Recheck
from gateway.core.strangers import Strangers
from gateway.errors import (
    BadRequestError,
    GatewayError,
    UnavailableError,
    UnsupportedError,
    UpstreamContentError,
)
from gateway.identity.model import Identified, NotIdentified
from gateway.routes import OWN_PREFIX, Route, client_location, match
from gateway.settings import LimitSettings
from keys.errors import KeysError
from policies.model import Action, Denied, Principal
from policies.store import InForce

#: Of a form on one of the gateway's own pages.
OWN_BODY_BYTES = 65_536

_ACTIONS: dict[str, Action] = {
    "GET": "read", "HEAD": "read", "POST": "create", "PUT": "update", "PATCH": "patch",
    "DELETE": "delete",
}  # fmt: skip
_BODILESS = frozenset({"GET", "HEAD"})
_COOKIE = "__host-havengate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What stays the same from one exchange to the next, and `strangers`, which counts.

    `strip` takes the gateway's own credentials out of a request before the app gets it. `clock` is
    Unix time in seconds.
    """

    tenant: str
    routes: tuple[Route, ...]
    handlers: Mapping[str, Handler]
    in_force: Callable[[], InForce]
    sealer: Sealer
    limits: LimitSettings
    strip: Callable[[Headers], Headers]
    clock: Callable[[], float]
    strangers: Strangers = field(default_factory=Strangers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What metrics may know of an exchange. Nothing in it names anybody."""

    service: str
    action: str
    status: int
    decision: Literal["allow", "deny", "none"]
    types: frozenset[str] = frozenset()
    failure: str | None = None
    #: The class of an exception that nobody foresaw.
    mistake: str | None = None
    #: Refused as somebody unknown, and not written into the log (`gateway.core.strangers`).
    unlogged: bool = False


def exchange(head: RequestHead, site: Site, *, request: str) -> Steps[Summary]:
    """Carry one request through. `request` is the id under which the client may ask about it."""
    return (yield from _Exchange(head, site, request).run())


@dataclass(slots=True)
class _Exchange:
    """The state of one exchange. What changes it stands in this class."""

    head: RequestHead
    site: Site
    request: str
    started: float = field(init=False)
    service: str = ""
    fhir: bool = False
    trail: Trail | None = None
    ended: bool = False
    answering: bool = False
    streaming: bool = False
    status: int = 0
    failure: str | None = None
    mistake: str | None = None
    unlogged: bool = False

    def __post_init__(self) -> None:
        self.started = self.site.clock()

    def run(self) -> Steps[Summary]:
        try:
            yield from self._attempt()
        except RefusedError as refused:
            yield from self._refuse(refused.denied, hide=refused.hide)
        except BadRequestError as error:
            yield from self._not_understood(error)
        except GatewayError as error:
            yield from self._fail(error.code, _refusal(error))
        except KeysError as error:
            # Pseudonyms and tokens are made while an answer is written, without a command.
            unable = UnavailableError("Keys cannot be had.", "gateway.keys")
            unable.__cause__ = error
            yield from self._fail(unable.code, _refusal(unable))
        except Exception as error:  # noqa: BLE001 - whatever went wrong, nothing is released
            detail = "The gateway made a mistake and released nothing. Tell the operator."
            self.mistake = type(error).__name__
            yield from self._fail("gateway.bug", Refusal(status=500, detail=detail))
        return self._summary()

    # --- In order -----------------------------------------------------------------------------

    def _attempt(self) -> Steps[None]:
        check_request(self.head, self.site.limits)
        if is_upgrade(self.head):
            raise UnsupportedError(
                "Connections that stay open (WebSocket, upgrade) are not offered here yet.",
                status=501,
            )
        if is_service_worker(self.head):
            raise UnsupportedError(
                "Service workers are not let in: one would see everything of every app on this "
                "host, and keep it.",
                status=403,
            )
        if self.head.path.startswith(OWN_PREFIX):
            yield from self._own()
            return
        route = match(self.site.routes, self.head.authority, self.head.path)
        if route is None:
            yield from self._send(self._written(answers.not_found()))
            return
        self.service, self.fhir = route.name, route.settings.content == "fhir"
        if self.head.method not in _ACTIONS:
            raise UnsupportedError("This method is not offered here.", status=405)
        yield from self._known_route(route)

    def _known_route(self, route: Route) -> Steps[None]:
        handler = self.site.handlers[route.name]
        answer = yield Identify(head=self.head, route=route)
        if isinstance(answer, Failed) and answer.who == "caller":
            raise BadRequestError(answer.message)
        if not isinstance(answer, Identified | NotIdentified):
            raise unavailable(answer)
        self.trail = self._trail(route, answer if isinstance(answer, Identified) else None)
        below = self.head.path.removeprefix(route.base) or "/"
        head = clean_request(self.head)
        head = replace(head, path=below, headers=self.site.strip(head.headers))
        if isinstance(answer, NotIdentified) and answer.credentials_given:
            yield from self._unknown(answer)
            return
        if isinstance(answer, NotIdentified) and not _is_public(handler, head):
            yield from self._unknown(answer)
            return
        plan = handler.plan(head)
        if isinstance(answer, NotIdentified):
            answer = _ANYBODY
            self.trail = self._trail(route, answer)
        enforcement = Enforcement(
            head=head,
            route=route,
            identified=answer,
            in_force=self.site.in_force(),
            sealer=self.site.sealer,
            limits=self.site.limits,
            trail=self.trail,
            now=self.started,
            opaque=isinstance(plan, Streamed),
        )
        try:
            if isinstance(plan, Streamed):
                yield from self._stream(enforcement, plan)
            else:
                yield from self._inspect(enforcement, handler)
        except RefusedError:
            # "Sign in" is what helps somebody who has not.
            if answer is _ANYBODY and self.trail.begun is None:
                yield from self._unknown(NotIdentified(reason="no_credentials"))
                return
            raise

    def _inspect(self, enforcement: Enforcement, handler: Handler) -> Steps[None]:
        body = b""
        if self._has_body():
            received = yield ReceiveAll(limit=self.site.limits.inspected_request_bytes)
            if received is Signal.GONE:
                self.status, self.failure = 499, "gateway.client_gone"
                return
            if not isinstance(received, bytes):
                raise _too_large(received)
            body = received
        trail = enforcement.trail
        trail.bytes_in = len(body)
        reply = yield from handler.exchange(enforcement, body)
        reply = _guarded(reply)
        yield from self._record_end(
            "success" if reply.head.status < HTTPStatus.BAD_REQUEST else "failed",
            status=reply.head.status,
            bytes_out=len(reply.body),
        )
        yield from self._send(reply)

    # --- What is not looked into --------------------------------------------------------------

    def _stream(self, enforcement: Enforcement, plan: Streamed) -> Steps[None]:
        patients = {one.patient for one in plan.questions if one.patient is not None}
        yield from enforcement.know(patients)
        for question in plan.questions:
            enforcement.demand(question)
        yield from enforcement.begin()
        has_body = self._has_body()
        addressed = yield from enforcement.address(enforcement.head)
        opened = yield OpenUpstream(route=enforcement.route, head=addressed, has_body=has_body)
        if opened is not Signal.DONE:
            raise upstream_failure(opened)
        # Whoever fails from here on closes it.
        self.streaming = True
        keep: _Keeping = "never" if patients else "anybody" if plan.public else "asking"
        recheck = Recheck(
            head=self.head,
            began=enforcement,
            questions=plan.questions,
            in_force=self.site.in_force,
            clock=self.site.clock,
            checked=self.started,
        )
        yield from self._stream_opened(enforcement, recheck, keep=keep, has_body=has_body)
        self.streaming = False
        yield CloseUpstream()

    def _stream_opened(
        self, enforcement: Enforcement, recheck: Recheck, *, keep: _Keeping, has_body: bool
    ) -> Steps[None]:
        if has_body and not (yield from self._upload(enforcement, recheck)):
            return
        answer = yield ReceiveHead()
        if not isinstance(answer, ResponseHead):
            raise upstream_failure(answer)
        if self.head.method in _BODILESS:
            # What was changed is said to have been changed, whatever was withdrawn meanwhile.
            yield from self._demand_again(recheck)
        head = self._passed(answer, enforcement.route, keep=keep)
        length = answer.headers.get("content-length")
        yield from self._record_end(
            "success" if answer.status < HTTPStatus.BAD_REQUEST else "failed",
            status=answer.status,
            bytes_out=int(length) if length is not None and length.isdecimal() else None,
        )
        self.answering, self.status = True, answer.status
        if (yield StartResponse(head=head)) is not Signal.DONE:
            self.failure = "gateway.client_gone"
            return
        yield from self._download(recheck)

    def _upload(self, enforcement: Enforcement, recheck: Recheck) -> Steps[bool]:
        """Pass the body on; False if the client went away, which is then in the log."""
        sent, trail = 0, enforcement.trail
        while True:
            piece = yield Receive()
            if piece is Signal.GONE:
                trail.bytes_in = sent
                self.failure = "gateway.client_gone"
                yield from self._record_end("aborted", status=499)
                return False
            if not isinstance(piece, bytes):
                break
            sent += len(piece)
            if sent > self.site.limits.streamed_bytes:
                raise BadRequestError("The body is larger than may pass here.", status=413)
            yield from self._demand_again(recheck)
            answer = yield SendUpstream(data=piece)
            if answer is Signal.END:
                trail.bytes_in = sent
                return True
            if answer is not Signal.DONE:
                raise upstream_failure(answer)
        if piece is not Signal.END:
            raise _too_large(piece)
        trail.bytes_in = sent
        answer = yield SendUpstream(data=None)
        if answer not in (Signal.DONE, Signal.END):
            raise upstream_failure(answer)
        return True

    def _download(self, recheck: Recheck) -> Steps[None]:
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
            if received > self.site.limits.streamed_bytes:
                self.failure = "gateway.answer_too_large"
                yield EndResponse(broken=True)
                return
            ended = yield from recheck.look()
            if ended is not None:
                self.failure = ended.code
                yield from self._record_cut(ended)
                yield EndResponse(broken=True)
                return
            if (yield Release(data=piece)) is not Signal.DONE:
                self.failure = "gateway.client_gone"
                return

    def _demand_again(self, recheck: Recheck) -> Steps[None]:
        """Raise unless it may go on; nothing of the answer has left yet."""
        ended = yield from recheck.look()
        if ended is None:
            return
        # The app must not take what it has so far for the whole.
        self.streaming = False
        yield CloseUpstream()
        if ended.denied is not None:
            self.failure = ended.code
            raise RefusedError(ended.denied)
        raise UnavailableError("This may not go on as it began.", ended.code)

    def _record_cut(self, ended: Ended) -> Steps[None]:
        """Write why an answer was cut off: its own outcome stands in the log already.

        It is cut off in any case, also if this cannot be written.
        """
        trail = self.trail
        if trail is None or trail.begun is None:
            raise RuntimeError("Nothing passes before it is in the log.")
        if ended.denied is not None:
            trail.denied(ended.denied)
        act = trail.act("deny", reason=ended.code, stream=trail.begun.request)
        answer = yield RecordIntent(act=act)
        if isinstance(answer, Recorded):
            end = trail.end("aborted", status=self.status, reason=ended.code)
            yield RecordOutcome(begun=answer.begun, end=end)

    # --- The gateway's own pages --------------------------------------------------------------

    def _own(self) -> Steps[None]:
        self.service = "havengate"
        body = b""
        if self._has_body():
            received = yield ReceiveAll(limit=OWN_BODY_BYTES)
            if received is Signal.GONE:
                self.status = 499
                return
            if not isinstance(received, bytes):
                raise _too_large(received)
            body = received
        answer = yield AnswerOwn(head=self.head, body=body)
        if not isinstance(answer, Fetched):
            raise unavailable(answer)
        yield from self._send(Reply(head=answer.head, body=answer.body))

    # --- The log ------------------------------------------------------------------------------

    def _record_end(
        self,
        outcome: Literal["success", "denied", "failed", "aborted"],
        *,
        status: int,
        reason: str | None = None,
        bytes_out: int | None = None,
    ) -> Steps[None]:
        """Write the outcome. Raises `UnavailableError` if it is not durable."""
        trail = self.trail
        if trail is None or trail.begun is None or self.ended:
            raise RuntimeError("An exchange ends once, after it began.")
        # Whatever comes of it, no second outcome is written.
        self.ended = True
        self.status = status
        end = trail.end(
            outcome,
            status=status,
            reason=reason,
            bytes_out=bytes_out,
            duration_us=max(0, int((self.site.clock() - self.started) * 1_000_000)),
        )
        answer = yield RecordOutcome(begun=trail.begun, end=end)
        if answer is not Signal.DONE:
            raise unavailable(answer)

    def _refuse(self, denied: Denied, *, hide: bool) -> Steps[None]:
        """The rules said no: into the log first, then to the client."""
        reason = denied.failure or denied.remedy.kind
        refusal = answers.for_denial(denied, hide=hide)
        if self.trail is not None:
            self.trail.denied(denied)
        yield from self._denied(refusal, reason)

    def _not_understood(self, error: BadRequestError) -> Steps[None]:
        """Tell the client; and the log, if it is somebody known who tried before anything began."""
        trail = self.trail
        if trail is None or trail.begun is not None or not trail.knows_who:
            yield from self._fail(error.code, _refusal(error))
            return
        self.failure = error.code
        yield from self._denied(_refusal(error), error.code)

    def _unknown(self, who: NotIdentified) -> Steps[None]:
        refusal = answers.sign_in(who.challenge, given=who.credentials_given)
        before = self.site.strangers.admit(self.head.client, self.started)
        if before is None:
            self.unlogged = True
            yield from self._send(self._written(refusal))
            return
        if before and self.trail is not None:
            self.trail.count("unlogged", before)
        yield from self._denied(refusal, who.reason)

    def _denied(self, refusal: Refusal, reason: str) -> Steps[None]:
        try:
            if self.trail is not None and self.trail.begun is None:
                answer = yield RecordIntent(act=self.trail.act("deny", reason=reason))
                if not isinstance(answer, Recorded):
                    raise unavailable(answer)
                self.trail.begun = answer.begun
            if not self.ended:
                yield from self._record_end("denied", status=refusal.status, reason=reason)
        except UnavailableError as error:
            refusal, self.failure = _refusal(error), error.code
        yield from self._send(self._written(refusal))

    def _fail(self, code: str, refusal: Refusal) -> Steps[None]:
        """Something went wrong: close what is open, in the log and towards the app and client."""
        self.failure = code
        if self.streaming:
            self.streaming = False
            yield CloseUpstream()
        if self.trail is not None and self.trail.begun is not None and not self.ended:
            try:
                yield from self._record_end("failed", status=refusal.status, reason=code)
            except UnavailableError as error:
                refusal = _refusal(error)
        if self.answering:
            yield EndResponse(broken=True)
            return
        yield from self._send(self._written(refusal))

    # --- Small things -------------------------------------------------------------------------

    def _send(self, reply: Reply) -> Steps[None]:
        self.answering, self.status = True, reply.head.status
        yield Respond(head=reply.head, body=reply.body)

    def _written(self, refusal: Refusal) -> Reply:
        form = answers.form_of(self.head, fhir=self.fhir)
        return answers.write(refusal, form=form, head=self.head, request=self._number())

    def _number(self) -> str:
        """The id in the log if there is an entry, so that an officer finds it."""
        begun = self.trail.begun if self.trail else None
        return begun.request if begun else self.request

    def _has_body(self) -> bool:
        length = self.head.headers.get("content-length")
        if self.head.method in _BODILESS:
            if length not in {None, "0"} or self.head.headers.get("transfer-encoding"):
                raise BadRequestError("A request that only reads must not have a body.")
            return False
        if length is not None:
            return length != "0"
        framed = self.head.headers.get("transfer-encoding") is not None
        return framed or self.head.http_version not in {"1", "1.0", "1.1"}

    def _passed(self, head: ResponseHead, route: Route, *, keep: _Keeping) -> ResponseHead:
        """The app's own answer, as far as it may leave.

        The app knows of no sign-in, so what it says about caches holds for `anybody` only.
        """
        cleaned = clean_response(head)
        fields = [
            (name, client_location(route, value) if name == "location" else value)
            for name, value in cleaned.headers
            if not (name == "set-cookie" and _is_our_cookie(value))
        ]
        passed = replace(cleaned, headers=Headers(tuple(fields)))
        if keep == "never":
            return never_stored(passed)
        return passed if keep == "anybody" else asked_each_time(passed)

    def _trail(self, route: Route, identified: Identified | None) -> Trail:
        return Trail(
            tenant=self.site.tenant,
            service=route.name,
            kind=route.settings.kind,
            action=_ACTIONS[self.head.method],
            identified=identified,
            address=self.head.client,
            now=self.started,
        )

    def _summary(self) -> Summary:
        trail = self.trail
        return Summary(
            service=self.service,
            action=trail.action if trail else "none",
            status=self.status,
            decision=(trail.decision if trail else None) or "none",
            types=trail.types if trail else frozenset(),
            failure=self.failure,
            mistake=self.mistake,
            unlogged=self.unlogged,
        )


#: Who may keep what was passed: no cache, one that asks again before it shows it, or any.
type _Keeping = Literal["never", "asking", "anybody"]


def _is_our_cookie(value: str) -> bool:
    """Also one without a name whose value looks like ours: browsers send both alike."""
    return value.lstrip(" \t=").lower().startswith(_COOKIE)


_ANYBODY = Identified(
    principal=Principal(kind="anonymous", id="anonymous"),
    means="anonymous",
    person="anonymous",
    purpose="SUPPORT",
)


def _is_public(handler: Handler, head: RequestHead) -> bool:
    """Who has not signed in does not even learn what could not be asked."""
    try:
        return handler.plan(head).public
    except BadRequestError:
        return False


def _refusal(error: GatewayError) -> Refusal:
    match error:
        case BadRequestError(status=status):
            return Refusal(status=status, detail=str(error))
        case UnavailableError():
            detail = "Something that is needed is not available now. Nothing was released."
            return Refusal(status=503, detail=detail, headers=(("retry-after", "5"),))
        case UpstreamContentError():
            detail = "The application's answer could not be protected, so it is not released."
            return Refusal(status=502, detail=detail)
    status = getattr(error, "status", 500)
    detail = (
        "The application behind did not answer in time. Whether it did what was asked is not known."
        if status == HTTPStatus.GATEWAY_TIMEOUT
        else "The application behind cannot be reached, or broke off."
    )
    return Refusal(status=status, detail=detail)


def _too_large(answer: object) -> GatewayError:
    if isinstance(answer, Failed) and answer.who == "caller":
        return BadRequestError(
            answer.message or "The body is too large, or came too slowly.",
            status=_BODY_STATUSES.get(answer.code, 408),
        )
    return unavailable(answer)


_BODY_STATUSES = {"gateway.too_large": 413, "gateway.length_required": 411}


def _guarded(reply: Reply) -> Reply:
    """What was looked into stays with the one who asked: no cache on the way keeps it."""
    head = never_stored(clean_response(reply.head))
    return replace(reply, head=replace(head, headers=head.headers.with_(*_NO_SNIFFING)))


_NO_SNIFFING = ("x-content-type-options", "nosniff")
