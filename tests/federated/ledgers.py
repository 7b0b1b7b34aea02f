"""Ledgers for tests: a simple accountant, a log that is written or only counted."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from audit.entry import parse_entry
from audit.model import Entry
from audit.reader import LogReader
from audit.recorder import Recorder
from federated.database import StudyDatabase
from federated.ledger import Ledger
from federated.model import NoisePlan, PrivacyCost, Sensitivity
from tests.federated.studies import NOW, PlainSealer

_OPENED: list[StudyDatabase] = []
STUDY = "5a" * 32
OTHER_STUDY = "6b" * 32


@dataclass(frozen=True)
class Adding:
    """The simplest accountant: ε adds up. What a test expects can be seen from the numbers."""

    delta: float = 1e-6

    def compose(self, costs: Sequence[PrivacyCost]) -> float:
        return round(sum(cost.epsilon for cost in costs), 9)


def cost(epsilon: float = 0.25) -> PrivacyCost:
    return PrivacyCost(
        epsilon=epsilon,
        delta=0.0,
        noise=NoisePlan(mechanism="discrete_laplace", scale=1.0 / epsilon),
        sensitivity=Sensitivity(l1=1.0, l2=1.0),
    )


class MemoryLog:
    """Keeps what is appended; as `audit.recorder.Appender`."""

    @dataclass(frozen=True)
    class Place:
        index: int

    def __init__(self) -> None:
        self.raw: list[bytes] = []

    def append(self, entry: bytes) -> Place:
        self.raw.append(entry)
        return self.Place(len(self.raw) - 1)

    @property
    def entries(self) -> list[Entry]:
        return [parse_entry(raw) for raw in self.raw]


def make_ledger(
    url: str, log: object, *, cap: float = 1.0, lower: Mapping[str, float] | None = None
) -> Ledger:
    """A ledger over the database at `url`, recording in `log`."""
    recorder = Recorder(
        log,  # type: ignore[arg-type]
        sealer=PlainSealer(),
        clock=lambda: float(NOW),
        ids=lambda: uuid.uuid4().hex,
    )
    _OPENED.append(StudyDatabase(url))
    return Ledger(
        _OPENED[-1],
        accountant=Adding(),
        cap=cap,
        lower=lower,
        recorder=recorder,
        tenant="clinic",
        clock=itertools.count(NOW).__next__,
        ids=lambda: uuid.uuid4().hex,
    )


def close_all() -> None:
    """Close the databases of all ledgers made."""
    while _OPENED:
        _OPENED.pop().close()


def entries_in(directory: Path) -> list[Entry]:
    """Every entry of a log's directory."""
    return [parse_entry(raw) for _, raw in LogReader(directory).read()]
