"""A scripted world for the core: answers commands from a table and keeps what was asked, in order.

`fail_at` lets one command in the sequence fail; nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from audit.recorder import Begun
from gateway.core import commands as c
from gateway.core.commands import Answer, Command, Facts, Failed, Fetched, Recorded, Signal
from gateway.core.exchange import Site, Summary, exchange
from gateway.core.handler import Handler
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.identity.model import Identified, NotIdentified
from gateway.routes import compile_routes
from gateway.settings import LimitSettings, RouteSettings
from policies.model import Assurance, Principal
from policies.settings import PoliciesSettings
from policies.store import InForce, load_in_force

NOW = 1_800_000_000.0
SECRET = b"what only the right one may read"


#: What a client that has gone away answers.
CLIENT = (c.ReceiveAll, c.Receive, c.Respond, c.StartResponse, c.Release)


@cache
def in_force() -> InForce:
    return load_in_force(PoliciesSettings())


def clinician(**changes: Any) -> Identified:
    principal = Principal(
        kind="user",
        id="practitioner-1",
        roles=frozenset({"clinician", "staff"}),
        assurance=Assurance(second_factor="totp", second_factor_at=NOW - 60),
        references=frozenset({"Practitioner/1"}),
    )
    values: dict[str, Any] = {
        "principal": replace(principal, **changes),
        "means": "session",
        "person": "Practitioner/1",
        "purpose": "TREAT",
        "role": "clinician",
    }
    return Identified(**values)


class PlainSealer:
    """Marks what is sealed and lets it be opened by the same person only."""

    generation = 0

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        return f"hg1.{person}.{field}.{plaintext.hex()}"

    def opener(
        self, *, person: str, service: str, sealed: Sequence[tuple[str, str]]
    ) -> Callable[[], list[bytes]]:
        return lambda: [
            self.unseal(person=person, service=service, field=field, text=text)
            for field, text in sealed
        ]

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        return bytes.fromhex(text.rsplit(".", 1)[1])

    def token_for_write(self, *, service: str, field: str, value: bytes) -> str:
        return f"hgi1.{value.hex()}"

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        return [f"hgi1.{value.hex()}"]

    def pseudonym(self, *, purpose: str, kind: str, value: str) -> str:
        return f"hgp1.{purpose}.{value[::-1]}"


def site(route: RouteSettings, handler: Handler) -> Site:
    return Site(
        tenant="clinic",
        routes=compile_routes([route]),
        handlers={route.name: handler},
        in_force=in_force,
        sealer=PlainSealer(),
        limits=LimitSettings(),
        strip=lambda headers: headers.without(("cookie", "authorization")),
        clock=lambda: NOW,
    )


def get(path: str, **headers: str) -> RequestHead:
    return request("GET", path, **headers)


def request(method: str, target: str, **headers: str) -> RequestHead:
    path, _, query = target.partition("?")
    fields = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return RequestHead(
        method=method,
        authority="gateway.test",
        path=path,
        query=query,
        headers=Headers((("host", "gateway.test"), *fields)),
        client="192.0.2.7",
    )


@dataclass
class World:
    """Plays everything that the core is not. `app` answers requests to the app."""

    who: Identified | NotIdentified = field(default_factory=clinician)
    care_team: frozenset[str] = frozenset()
    consents: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    app: Callable[[RequestHead, bytes], tuple[int, dict[str, str], bytes]] | None = None
    body: Sequence[bytes] = ()
    answer: Sequence[bytes] = ()
    answer_head: ResponseHead = field(default_factory=lambda: ResponseHead(status=200))
    fail_at: int | None = None
    failure: Answer = field(default_factory=lambda: Failed(code="test.down"))
    gone_at: int | None = None

    asked: list[Command] = field(default_factory=list)
    sent: bytearray = field(default_factory=bytearray)
    uploaded: bytearray = field(default_factory=bytearray)
    heads: list[ResponseHead] = field(default_factory=list)
    summary: Summary | None = None

    def run(self, head: RequestHead, site: Site) -> Summary:
        self._pieces = list(self.body)
        self._answer = list(self.answer)
        steps = exchange(head, site, request="request-1")
        answer: Answer | None = None
        while True:
            try:
                command = next(steps) if answer is None else steps.send(answer)
            except StopIteration as stop:
                summary: Summary = stop.value
                self.summary = summary
                return summary
            self.asked.append(command)
            answer = self._answered(command)

    def _answered(self, command: Command) -> Answer:
        here = len(self.asked) - 1
        if here == self.fail_at:
            return self.failure
        if here == self.gone_at and isinstance(command, CLIENT):
            return Signal.GONE
        return self._play(command)

    def _play(self, command: Command) -> Answer:  # noqa: C901, PLR0911, PLR0912 - one table
        match command:
            case c.Identify():
                return self.who
            case c.LoadFacts(patients=patients):
                consents = {one: self.consents.get(one, ()) for one in patients}
                return Facts(care_team=self.care_team & patients, consents=consents)
            case c.Assert():
                return b"signed.statement.here"
            case c.RecordIntent(act=act):
                return Recorded(begun=Begun(request="0" * 32, index=1, act=act, sealed={}))
            case c.ReceiveAll(limit=limit):
                whole = b"".join(self._pieces)
                if len(whole) > limit:
                    return Failed(code="gateway.too_large", who="caller", message="too large")
                return whole
            case c.Receive():
                return self._pieces.pop(0) if self._pieces else Signal.END
            case c.Respond(head=head, body=body):
                self.heads.append(head)
                self.sent += body
                return Signal.DONE
            case c.StartResponse(head=head):
                self.heads.append(head)
                return Signal.DONE
            case c.Release(data=data):
                self.sent += data
                return Signal.DONE
            case c.Fetch(head=head, body=body):
                assert self.app is not None
                status, headers, content = self.app(head, body)
                given = Headers(tuple(headers.items()))
                return Fetched(head=ResponseHead(status=status, headers=given), body=content)
            case c.SendUpstream(data=data):
                self.uploaded += data or b""
                return Signal.DONE
            case c.ReceiveHead():
                return self.answer_head
            case c.ReceiveUpstream():
                return self._answer.pop(0) if self._answer else Signal.END
            case _:
                return Signal.DONE

    # --- What happened --------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return self.heads[-1].status

    def names(self) -> list[str]:
        return [type(command).__name__ for command in self.asked]

    def intents(self) -> list[c.RecordIntent]:
        return [one for one in self.asked if isinstance(one, c.RecordIntent)]

    def outcomes(self) -> list[c.RecordOutcome]:
        return [one for one in self.asked if isinstance(one, c.RecordOutcome)]
