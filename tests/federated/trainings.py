"""A training over five real nodes without a network, for tests that stop it anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from federated.code_hash import installed_code_hash
from federated.conduct import Conduct, numbers_of
from federated.draft import parse_draft
from federated.learning.round_query import TrainQuery
from federated.manifest import Study
from federated.node.budget import Budget, Cap
from federated.planning import plan_study
from federated.questions import declared_question
from federated.study_run import RoundOutcome, StudyRun
from federated.training_files import TrainingFiles
from federated.training_run import Checkpoints, TrainedOutcome
from tests.federated.deployment.federation import accountant
from tests.federated.runs import NODES, RUN, World, opened_for

PEOPLE = 30
TEXT = """
id = "low-mood"
title = "Low mood after short nights"
question = "Does sleep tell low mood?"
valid_from = FROM
valid_until = UNTIL
minimum_cohort = 60
sites = ["north", "south"]

[aggregation]
threshold = 4
colluding = 1
minimum_survivors = 4

[[queries]]
epsilon = 12.0
delta = 1e-7
[queries.ask]
kind = "train"
name = "mood"
features = [{ column = "sleep_hours", low = 4.0, high = 10.0 }]
label = { column = "mood", below = 0.0 }
work = { epochs = 4, rate = 2.0 }
rounds = 6
held_out = 0.3
canaries = 200

[[queries]]
epsilon = 3.0
[queries.ask]
kind = "evaluate"
name = "how-good"
of = "mood"
bins = 4
"""


def study(roster: str, changes: Mapping[str, str] | None = None) -> Study:
    """The study, whole; `changes` replace texts of its file."""
    now = int(time.time())
    text = TEXT
    for old, new in {"FROM": str(now - 60), "UNTIL": str(now + 86_400), **(changes or {})}.items():
        text = text.replace(old, new)
    return plan_study(
        parse_draft(text.encode()),
        people=PEOPLE * NODES,
        level=0.95,
        roster=roster,
        code_hash=installed_code_hash(),
        nodes=NODES,
    ).study


def query_of(of: Study) -> TrainQuery:
    """The training of a study."""
    found = declared_question(of.query("mood").ask)
    assert isinstance(found, TrainQuery)
    return found


def people_of(node: str) -> Mapping[str, Mapping[str, list[float]]]:
    """Thirty people whose mood follows their sleep, each over ten days."""
    drawn = np.random.default_rng(int(node.partition("-")[2]))
    found = {}
    for number in range(PEOPLE):
        sleep = drawn.uniform(4.0, 10.0, 10)
        mood = np.clip((sleep - 7.0) + drawn.normal(0.0, 0.8, 10), -6.0, 6.0)
        found[f"p{number}"] = {"sleep_hours": sleep.tolist(), "mood": mood.tolist()}
    return found


@contextmanager
def training_world(directory: Path, changes: Mapping[str, str] | None = None) -> Iterator[World]:
    """Everybody's nodes, and a study that trains and judges."""
    with opened_for(
        directory, lambda roster: study(roster, changes), people_of, cap=100.0
    ) as world:
        world.most_people = PEOPLE
        for node in world.nodes.values():
            Budget(node.store, accountant).set_cap(Cap(epsilon=40.0, delta=1e-3))
        yield world


def conduct(
    world: World,
    directory: Path,
    *,
    run_id: int = RUN,
    checkpoints: Checkpoints | None = None,
    said: list[str] | None = None,
) -> Conduct:
    """A coordinator's conduct of a run."""
    world.run_id = run_id
    of = world.signed.study
    files = TrainingFiles(directory=directory / "trainings", study_hash=of.study_hash)
    lines = [] if said is None else said
    return Conduct(
        study=of,
        run=StudyRun(world.signed, world.ports(), run_id=run_id),
        checkpoints=checkpoints or files,
        reservation=lambda name: world.ledger.reservation(study=of.study_hash, round_id=name),
        say=lines.append,
    )


def train(
    world: World,
    directory: Path,
    *,
    run_id: int = RUN,
    checkpoints: Checkpoints | None = None,
    said: list[str] | None = None,
) -> TrainedOutcome:
    """Begin the training, or go on with it."""
    found = conduct(world, directory, run_id=run_id, checkpoints=checkpoints, said=said).ask(
        "mood", 0
    )
    assert isinstance(found, TrainedOutcome)
    return found


def judged(world: World, directory: Path) -> tuple[TrainedOutcome, RoundOutcome]:
    """Training and evaluation, in one run."""
    asking, numbers = conduct(world, directory), numbers_of(world.signed.study)
    trained = asking.ask("mood", numbers["mood"])
    evaluated = asking.ask("how-good", numbers["how-good"])
    assert isinstance(trained, TrainedOutcome)
    assert isinstance(evaluated, RoundOutcome)
    return trained, evaluated
