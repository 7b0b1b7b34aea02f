"""How far a training has come, read from what it keeps between rounds; never its weights.

For somebody who watches from another process. Reads no state of the model, asks nobody and changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from federated.errors import CheckpointError
from federated.learning.round_query import TrainQuery
from federated.manifest import DeclaredQuery, Study
from federated.questions import declared_question
from federated.training_run import parse_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """`asked` rounds of `announced` were dispatched, `summed` came to a sum.

    `epsilon`: what those asked have said of a person, at `delta`; `reserved` is what was paid, for
    all rounds, with the first. `damaged`: what is kept cannot be read, and says nothing.
    """

    query: str
    asked: int = 0
    summed: int = 0
    announced: int = 0
    epsilon: float = 0.0
    reserved: float = 0.0
    delta: float = 0.0
    over: bool = False
    damaged: bool = False


class KeptTrainings(Protocol):
    """What is needed of `training_files.TrainingFiles`."""

    def read(self, query: str) -> bytes | None:
        """What was written last, or None. Raises `CheckpointError`."""
        ...


def progress_of(study: Study, kept: KeptTrainings) -> Iterator[TrainingProgress]:
    """Of each training of the study that was begun, in the study's order. Never raises for it."""
    for declared in study.queries:
        query = declared_question(declared.ask)
        if isinstance(query, TrainQuery):
            found = _progress(study, declared, query, kept)
            if found is not None:
                yield found


def _progress(
    study: Study, declared: DeclaredQuery, query: TrainQuery, kept: KeptTrainings
) -> TrainingProgress | None:
    try:
        data = kept.read(query.name)
        if data is None:
            return None
        found = parse_kept(data, study=study, query=query)
    except CheckpointError:
        return TrainingProgress(query=query.name, damaged=True)
    return TrainingProgress(
        query=query.name,
        asked=found.asked,
        summed=len(found.people),
        announced=query.rounds,
        epsilon=_so_far(declared, query, found.asked),
        reserved=declared.epsilon,
        delta=declared.delta,
        over=found.over(query),
    )


@lru_cache(maxsize=64)
def _so_far(declared: DeclaredQuery, query: TrainQuery, done: int) -> float:
    return query.epsilon_after(done, declared.noise, delta=declared.delta)
