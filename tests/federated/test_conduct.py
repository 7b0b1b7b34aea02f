"""In which order a run asks a study's questions, and by which numbers."""

from __future__ import annotations

import pytest

from federated.conduct import numbers_of
from federated.planning import study_costs, verify_within
from tests.federated.trainings import study

MEAN = """[[queries]]
epsilon = 1.0
[queries.ask]
kind = "mean"
name = "hours"
column = "sleep_hours"

[[queries]]
epsilon = 12.0"""


def test_trainings_are_asked_first_by_the_numbers_that_the_studys_order_gives_them() -> None:
    found = numbers_of(study("ab" * 32, {"[[queries]]\nepsilon = 12.0": MEAN}))
    assert found == {"hours": 0, "mood": 1, "how-good": 7}
    assert list(found) == ["mood", "hours", "how-good"]


@pytest.mark.parametrize("text", ["[[queries]]\nepsilon = 12.0", ""])
def test_a_training_that_was_stopped_leaves_room_for_all_that_is_left(text: str) -> None:
    """What was asked before it would be asked, and charged, once more: it could never go on."""
    of = study("ab" * 32, {text: MEAN} if text else None)
    names, costs = list(numbers_of(of)), study_costs(of)
    place = names.index("mood")
    charged = [costs[name] for name in names[: place + 1]]
    verify_within(of, [*charged, *(costs[name] for name in names if name != "mood")])
