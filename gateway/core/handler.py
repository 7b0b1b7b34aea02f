"""What knows the meaning of requests to one app, and is asked by the core.

There are two: `gateway.fhir.handler` and `gateway.content.handler` (JSON by rules, and whatever is
passed without being looked into). One object serves a route for as long as its settings hold; it
keeps no state of an exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gateway.core.enforcement import Enforcement, Question, Reply, Steps
from gateway.core.messages import RequestHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """Body and answer are read as a whole, understood, and decided record by record.

    `public`: whoever has not signed in may ask, if the rules say so too.
    """

    public: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Bodies pass as they are, in pieces, once all `questions` are allowed.

    What was allowed only with something to be done to the content (redact, mask, …) is denied.
    """

    questions: tuple[Question, ...]
    public: bool = False


class Handler(Protocol):
    """See the module."""

    def plan(self, head: RequestHead) -> Inspected | Streamed:
        """Say from the head alone how the exchange must go.

        Raises `BadRequestError` for what cannot be meant, `UnsupportedError` for what nobody may.
        `head.path` is below the route's base.
        """
        ...

    def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
        """Carry out an inspected exchange. May raise `RefusedError` and any `GatewayError`."""
        ...
