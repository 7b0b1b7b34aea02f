"""Which way each question of a run is asked: a statistic, a training, or an evaluation of one.

An evaluation starts from the weights of its training, so a study names that first. A training that
was finished in an earlier run is not asked again, and one that was stopped goes on in the next: so
trainings come before all else, since what was asked before them would be asked and charged again,
and then nothing would be left for them to go on with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federated.errors import CohortError
from federated.learning.evaluate import EvaluateQuery
from federated.learning.round_query import TrainQuery
from federated.ledger import Reservation
from federated.manifest import Study
from federated.questions import declared_question
from federated.rounds import first_rounds
from federated.study_run import RoundOutcome, Say, StudyRun
from federated.training_run import Checkpoints, TrainedOutcome, Training, TrainingPorts


@dataclass(slots=True, kw_only=True)
class Conduct:
    """Asks a study's questions. `reservation` finds what is reserved under a round's name."""

    study: Study
    run: StudyRun
    checkpoints: Checkpoints
    reservation: Callable[[str], Reservation | None]
    say: Say = lambda _: None
    still: Callable[[], None] = lambda: None
    _waits: str = ""
    _weights: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def ask(self, name: str, round_number: int) -> RoundOutcome | TrainedOutcome:
        """Ask one question. Raises as `StudyRun.ask` and `Training.train`."""
        declared = self.study.query(name)
        query = declared_question(declared.ask)
        if isinstance(query, TrainQuery):
            ports = TrainingPorts(
                run=self.run,
                checkpoints=self.checkpoints,
                reservation=self.reservation,
                say=self.say,
                still=self.still,
            )
            training = Training(self.study, declared, query, ports)
            try:
                trained = training.train(round_number)
            except CohortError:
                self._waits = "" if training.is_over else name
                raise
            self._weights[name] = trained.weights
            return trained
        if self._waits:
            # What is answered now would be charged again in the run that goes on with the training.
            raise CohortError(
                f"{name} waits for the training {self._waits}, which is not over: run the study "
                "again."
            )
        if isinstance(query, EvaluateQuery):
            weights = self._weights.get(query.spec.name)
            if weights is None:
                raise CohortError(
                    f"{query.spec.name} has no finished model to judge: {name} was not asked."
                )
            return self.run.ask(name, round_number, given=query.give(weights))
        return self.run.ask(name, round_number)


def numbers_of(study: Study) -> dict[str, int]:
    """The number of each question's first round in a run: those before it have theirs.

    Numbers follow the study's order; the questions stand as they are asked, trainings first.
    """
    asked = {one.name: declared_question(one.ask) for one in study.queries}
    numbers = first_rounds(study, lambda one: asked[one.name].rounds)
    # Sorting keeps the order of equals.
    return dict(sorted(numbers.items(), key=lambda one: not isinstance(asked[one[0]], TrainQuery)))
