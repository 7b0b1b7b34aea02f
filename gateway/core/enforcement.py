"""What handlers of content work with: questions to the rules, facts, keys, the app, and the log.

One `Enforcement` lives as long as one exchange. Handlers (`gateway.fhir.handler`,
`gateway.content.handler`) know what a request means; this knows what must happen in which order,
and keeps what the log will say. All methods that need the world are generators of commands, to be
used with `yield from`; the others are pure.

Order that a handler keeps: `know` the patients, `ask`, `begin`, then `fetch`, then for each record
of the answer `know`, `ask`, `release` or `withhold`. Before `begin` only reading is possible.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.core.commands import Answer, Command, Fetched
from gateway.core.messages import RequestHead, ResponseHead
from gateway.identity.model import Identified
from gateway.routes import Route
from gateway.settings import LimitSettings
from policies.labels import Labeller, Labels
from policies.model import Action, Allowed, Decision, Denied, Purpose
from policies.obligations import Obligation

type Steps[T] = Generator[Command, Answer, T]


class RefusedError(Exception):
    """The rules say no to the exchange as a whole: the handler stops, the core answers.

    `hide`: the client must not learn whether the record exists (answered as 404).
    """

    def __init__(self, denied: Denied, *, hide: bool = False) -> None:
        super().__init__(denied.reason)
        self.denied = denied
        self.hide = hide


class Sealer(Protocol):
    """Seals and opens, without I/O once keys are loaded. Raises a `KeysError`."""

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        """Seal one element for a person (`Patient/7`)."""
        ...

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        """Open one. Raises `PersonErasedError`, or `UnsealError` if it is not authentic."""
        ...

    def token_for_write(self, *, service: str, field: str, value: bytes) -> str:
        """The blind-index token to store."""
        ...

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        """The tokens to search for."""
        ...

    def pseudonym(self, *, purpose: Purpose, kind: str, value: str) -> str:
        """A stable stand-in for an identifier, other for each purpose and installation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One thing that is asked for. `patient` and `id` are ids without type.

    `authors` are references (`Practitioner/7`) of those who wrote it.
    """

    action: Action
    type: str
    id: str | None = field(default=None, repr=False)
    patient: str | None = field(default=None, repr=False)
    authors: frozenset[str] = field(default=frozenset(), repr=False)
    labels: Labels = field(default_factory=Labels)
    codes: frozenset[tuple[str, str]] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a handler gives back: an answer ready to be released once the outcome is durable."""

    head: ResponseHead
    body: bytes = field(default=b"", repr=False)


class Enforcement:
    """See the module. Attributes are read-only for handlers."""

    head: RequestHead
    route: Route
    identified: Identified
    limits: LimitSettings
    labeller: Labeller
    sealer: Sealer
    now: float

    # --- Facts and questions ----------------------------------------------------------------------

    def know(self, patients: Collection[str]) -> Steps[None]:
        """Learn relations and consents of patients not known yet. Raises when they cannot be."""
        raise NotImplementedError

    def ask(self, question: Question) -> Decision:
        """Ask the rules. Never raises; what cannot be decided is denied.

        Patients must be known before (`know`), or the answer is a denial.
        """
        raise NotImplementedError

    def demand(self, question: Question) -> Allowed:
        """Ask, and raise `RefusedError` unless allowed."""
        raise NotImplementedError

    # --- The log ----------------------------------------------------------------------------------

    def begin(
        self, questions: Iterable[Question], *, counts: dict[str, int] | None = None
    ) -> Steps[None]:
        """Make the intent durable: once, before anything that changes something."""
        raise NotImplementedError

    def release(self, question: Question, allowed: Allowed) -> tuple[Obligation, ...]:
        """Note that a record will be released; return the obligations to carry out on it."""
        raise NotImplementedError

    def withhold(self, question: Question, denied: Denied) -> None:
        """Note that a record was left out."""
        raise NotImplementedError

    def count(self, name: str, number: int = 1) -> None:
        """Add to a number that the log will show (`returned`, `total`, …)."""
        raise NotImplementedError

    # --- Keys and the app -------------------------------------------------------------------------

    def load_keys(self, *, persons: Iterable[str] = (), texts: Iterable[str] = ()) -> Steps[None]:
        """Bring keys into memory. Raises when they cannot be."""
        raise NotImplementedError

    def fetch(self, head: RequestHead, body: bytes = b"") -> Steps[Fetched]:
        """Ask the app, the statement of identity added. Raises an `UpstreamError`.

        `head.path` is as the client would write it, below the route's base. Before `begin` only
        GET is sent.
        """
        raise NotImplementedError
