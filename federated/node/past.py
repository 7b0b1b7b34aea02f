"""What people brought in earlier rounds of a training by turns, since later rounds send it again.

Lives here: keeping it, sealed under the person's own key like their rows, and letting it go. What
it is, and how long it is of use, is the question's (`model.Carried`). It is a clipped update, so it
is data about a person: it goes when nothing needs it any more, 30 days after it was last of use or
when the study's time is over, and at once when the person takes back any consent, pauses,
withdraws, leaves or is erased (`node.consent`, `node.store`). Losing it costs accuracy and never
privacy, so nothing here needs to be the newest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from federated.errors import StoreError
from federated.node.store import Person, Store

_LOG = structlog.get_logger("federated.node")
_CONTEXT: Final = "havengate/device/past/v1"
_NUMBER_BYTES: Final = 8

type Brought = Mapping[int, NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What people in a store brought to one question of a study (its hash)."""

    store: Store
    study: str
    query: str

    def of(self, person: Person, *, dimension: int) -> Brought:
        """What the person brought: round → vector of that dimension. Nothing where it is damaged.

        Raises `StoreError` where the store cannot be read at all.
        """
        found = self.store.database.one(
            "SELECT sealed FROM past WHERE person = ? AND study = ? AND query = ?",
            [person.number, self.study, self.query],
        )
        if found is None:
            return {}
        try:
            raw = self.store.unseal(person, found[0], _CONTEXT, self.study, self.query)
            wire = msgspec.msgpack.decode(raw, type=dict[int, bytes])
        except (StoreError, msgspec.DecodeError):
            _LOG.warning("federated.node.past_lost")
            return {}
        return {
            at: np.frombuffer(one, dtype="<i8").astype(np.int64)
            for at, one in wire.items()
            if len(one) == _NUMBER_BYTES * dimension
        }

    def keep(self, brought: Mapping[Person, Brought], *, until: int) -> None:
        """Keep this of each, and nothing else, until the Unix time `until` at most.

        All of it or nothing. Raises `StoreError`.
        """
        with self.store.database.transaction():
            for person, vectors in brought.items():
                self._keep_one(person, vectors, until)

    def _keep_one(self, person: Person, brought: Brought, until: int) -> None:
        where = [person.number, self.study, self.query]
        if not brought:
            self.store.database.run(
                "DELETE FROM past WHERE person = ? AND study = ? AND query = ?", where
            )
            return
        wire = {at: one.astype("<i8").tobytes() for at, one in brought.items()}
        raw = msgspec.msgpack.encode(wire)
        sealed = self.store.seal(person, raw, _CONTEXT, self.study, self.query)
        self.store.database.run(
            "INSERT OR REPLACE INTO past VALUES (?, ?, ?, ?, ?)", [*where, until, sealed]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """That something is kept of what a person brought: to which study (its hash), until when."""

    study: str
    query: str
    until: int


def kept_of(store: Store, person: Person) -> tuple[Kept, ...]:
    """All that is kept of a person, without what it is: for the person's own eyes."""
    found = store.database.all(
        "SELECT study, query, until FROM past WHERE person = ? ORDER BY study, query",
        [person.number],
    )
    return tuple(Kept(study=study, query=query, until=until) for study, query, until in found)


def expire(store: Store, now: int) -> None:
    """Let go of what belongs to studies whose time is over."""
    if store.database.one("SELECT 1 FROM past WHERE until <= ? LIMIT 1", [now]) is None:
        return
    with store.database.transaction():
        store.database.run("DELETE FROM past WHERE until <= ?", [now])
