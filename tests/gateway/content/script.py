"""A world in which a handler's exchange is carried out: an app in memory, readable seals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from audit.recorder import Begun
from gateway.content.handler import ContentHandler
from gateway.core.commands import (
    Answer,
    Assert,
    Facts,
    Failed,
    Fetch,
    Fetched,
    LoadFacts,
    LoadKeys,
    MakeReady,
    Recorded,
    RecordIntent,
    Signal,
)
from gateway.core.enforcement import Enforcement, Reply
from gateway.core.entries import Trail
from gateway.core.handler import Inspected
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import NotAtHandError
from gateway.identity.model import Identified
from gateway.routes import compile_routes
from gateway.settings import FieldSettings, LimitSettings, RouteSettings, RuleSettings
from keys.errors import PersonErasedError, UnsealError
from policies.consent import Consent
from policies.model import Assurance, Principal, Purpose
from policies.settings import PoliciesSettings
from policies.store import InForce, load_in_force

NOW = 1.8e9


@cache
def in_force() -> InForce:
    return load_in_force(PoliciesSettings())


class Seals:
    """Seals that can be read in a test. Opening checks person, service and field.

    With `lacking` nothing is at hand when it is asked for the first time.
    """

    generation = 0

    def __init__(self, *, lacking: bool = False) -> None:
        self.erased: set[str] = set()
        self._lacking = lacking
        self._asked: set[tuple[str, str] | None] = set()

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        inside = json.dumps([person, service, field, plaintext.decode("latin-1")]).encode()
        return "hg1." + base64.urlsafe_b64encode(inside).decode()

    def opener(
        self, *, person: str, service: str, sealed: Sequence[tuple[str, str]]
    ) -> Callable[[], list[bytes]]:
        return lambda: [
            self.unseal(person=person, service=service, field=field, text=text)
            for field, text in sealed
        ]

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        if person in self.erased:
            raise PersonErasedError("gone")
        try:
            *place, plain = json.loads(base64.urlsafe_b64decode(text.removeprefix("hg1.")))
        except ValueError as error:
            raise UnsealError("malformed") from error
        if place != [person, service, field]:
            raise UnsealError("moved")
        return str(plain).encode("latin-1")

    def token_for_write(self, *, service: str, field: str, value: bytes) -> str:
        self._at_hand(None)
        return f"hgi1.2.{service}.{field}.{value.hex()}"

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        self._at_hand(None)
        return [f"hgi1.{version}.{service}.{field}.{value.hex()}" for version in (2, 1)]

    def pseudonym(self, *, purpose: Purpose, kind: str, value: str) -> str:
        self._at_hand((purpose, f"{kind}/{value}"))
        return f"pseudonym-{purpose}-{kind}-{len(value)}"

    def _at_hand(self, name: tuple[str, str] | None) -> None:
        if self._lacking and name not in self._asked:
            self._asked.add(name)
            raise NotAtHandError(name)


def someone(
    *roles: str, purpose: Purpose = "TREAT", factor_age_s: float | None = 10, **changes: Any
) -> Identified:
    assurance = Assurance()
    if factor_age_s is not None:
        assurance = Assurance(second_factor="totp", second_factor_at=NOW - factor_age_s)
    principal = Principal(
        kind="user", id="someone", roles=frozenset(roles), assurance=assurance, **changes
    )
    return Identified(principal=principal, means="session", person="account/1", purpose=purpose)


def patient(name: str = "1", **changes: Any) -> Identified:
    return someone(purpose="PATRQT", patient=name, **changes)


def answer(value: Any = None, status: int = 200, **headers: str) -> Fetched:
    fields = {"content-type": "application/json"} | {
        name.replace("_", "-"): text for name, text in headers.items()
    }
    body = (
        value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
    )
    return Fetched(
        head=ResponseHead(status=status, headers=Headers(tuple(fields.items()))), body=body
    )


type App = Callable[[RequestHead, bytes], Fetched | Failed]


@dataclass
class World:
    """Carries out what an exchange asks for, and remembers it."""

    app: App
    team: frozenset[str] = frozenset()
    consents: dict[str, tuple[Consent, ...]] = field(default_factory=dict)
    intent: Answer | None = None
    seals: Seals = field(default_factory=lambda: Seals(lacking=True))
    log: list[str] = field(default_factory=list)
    sent: list[tuple[RequestHead, bytes]] = field(default_factory=list)
    loaded: list[LoadKeys] = field(default_factory=list)
    trail: Trail | None = None

    def do(self, command: object) -> Answer:  # noqa: PLR0911 - one table
        match command:
            case LoadFacts(patients=patients):
                return Facts(
                    care_team=self.team & patients,
                    consents={one: self.consents.get(one, ()) for one in patients},
                )
            case Assert():
                return b"statement"
            case RecordIntent(act=act):
                self.log.append(f"intent {act.decision}")
                if self.intent is not None:
                    return self.intent
                return Recorded(begun=Begun(request="r", index=1, act=act, sealed={}))
            case LoadKeys():
                self.loaded.append(command)
                return Signal.DONE
            case MakeReady():
                return Signal.DONE
            case Fetch(head=head, body=body):
                self.log.append(f"{head.method} {head.target}")
                self.sent.append((head, body))
                return self.app(head, body)
        raise AssertionError(command)


def route(*rules: RuleSettings, **changes: Any) -> RouteSettings:
    values = {"kind": "mood", "upstream": "http://127.0.0.1:1", "patient_facts": "none"} | changes
    if "fields" in values:
        values["fields"] = tuple(
            FieldSettings(path=path, **how) for path, how in values["fields"].items()
        )
    return RouteSettings(name="app", content="json", rules=rules, **values)


def run(
    settings: RouteSettings,
    world: World,
    who: Identified,
    method: str,
    target: str,
    body: Any = None,
    **headers: str,
) -> Reply:
    """One inspected exchange; raises what the handler raises."""
    fields = {name.replace("_", "-"): text for name, text in headers.items()}
    if body is not None:
        fields.setdefault("content-type", "application/json")
    path, _, query = target.partition("?")
    head = RequestHead(
        method=method,
        authority="gw",
        path=path,
        query=query,
        headers=Headers(tuple(fields.items())),
    )
    handler = ContentHandler(settings)
    assert isinstance(handler.plan(head), Inspected)
    [compiled] = compile_routes([settings])
    world.trail = Trail(
        tenant="t", service="app", kind=settings.kind, action="read", identified=who,
        address=None, now=NOW,
    )  # fmt: skip
    enforcement = Enforcement(
        head=head, route=compiled, identified=who, in_force=in_force(), sealer=world.seals,
        limits=LimitSettings(), trail=world.trail, now=NOW,
    )  # fmt: skip
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    steps = handler.exchange(enforcement, raw)
    try:
        command = next(steps)
        while True:
            command = steps.send(world.do(command))
    except StopIteration as ended:
        assert world.trail.begun is not None
        reply: Reply = ended.value
        return reply
