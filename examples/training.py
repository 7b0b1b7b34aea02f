"""The third part of `make demo`: a model trained over the four sites, judged, audited, released.

PHQ-9 of 10 or more from sleep, activity and demographics, on the NHANES 2017-2018 people (US public
domain) that the sites have already. Since these data are public, the demo can also put beside it
what a study never could: the same model without privacy, with one trusted curator, and from each
site alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from federated.learning.round_query import TrainQuery
    from federated.model import PersonRows

STUDY: Final = "phq9-model"
#: Rounds after which a model without noise learns no more.
_LONG: Final = 100
COLUMNS: Final = (
    "age_years", "daytime_sleepiness", "education", "income_ratio", "moderate_recreation",
    "partner", "phq9_total", "sedentary_minutes", "sex", "sleep_hours", "snoring",
    "trouble_sleeping", "vigorous_recreation", "vigorous_work", "walk_or_bicycle",
)  # fmt: skip
_DRAFT: Final = """\
id = "{name}"
title = "Who has a PHQ-9 of 10 or more?"
question = "How well do sleep, activity and demographics tell a PHQ-9 of 10 or more?"
valid_from = {today}
minimum_cohort = 1000

[aggregation]
threshold = 3

[[queries]]
epsilon = 2.0
delta = 1e-5

[queries.ask]
kind = "train"
name = "phq9"
per = "person"
features = [
    {{ column = "sleep_hours", low = 4.0, high = 7.5 }},
    {{ column = "sleep_hours", low = 7.5, high = 11.0 }},
    {{ column = "trouble_sleeping", low = 0.0, high = 1.0 }},
    {{ column = "daytime_sleepiness", low = 0.0, high = 4.0 }},
    {{ column = "snoring", low = 0.0, high = 3.0 }},
    {{ column = "sedentary_minutes", low = 0.0, high = 900.0 }},
    {{ column = "vigorous_work", low = 0.0, high = 1.0 }},
    {{ column = "vigorous_recreation", low = 0.0, high = 1.0 }},
    {{ column = "moderate_recreation", low = 0.0, high = 1.0 }},
    {{ column = "walk_or_bicycle", low = 0.0, high = 1.0 }},
    {{ column = "age_years", low = 18.0, high = 50.0 }},
    {{ column = "age_years", low = 50.0, high = 80.0 }},
    {{ column = "sex", low = 0.0, high = 1.0 }},
    {{ column = "income_ratio", low = 0.0, high = 5.0 }},
    {{ column = "education", low = 0.0, high = 4.0 }},
    {{ column = "partner", low = 0.0, high = 1.0 }},
]
label = {{ column = "phq9_total", low = 0.0, high = 27.0, at_least = 10.0 }}
# Chosen by simulation on public data before anybody was asked.
work = {{ rate = 10.0, l2 = 1e-4 }}
clip = 20.0
rounds = 10
held_out = 0.2
canaries = 500

[[queries]]
epsilon = 0.9

[queries.ask]
kind = "evaluate"
name = "how-good"
of = "phq9"
bins = 16
"""


class Desk(Protocol):
    """What is needed of `examples.study.Desk`."""

    home: Path

    def havengate(self, *words: str, of: str | None = None, there: Path | None = None) -> str:
        """Run a command."""
        ...

    def asked(self, *words: str, **given: Any) -> dict[str, Any]:
        """Run a command; its answer."""
        ...


type Say = Callable[[str, str], None]


def play(desk: Desk, people: int, sites: Sequence[Path], say: Say) -> None:
    """Plan, propose, approve, train, judge, release; then compare, since these data are public."""
    began = time.monotonic()
    draft, whole = desk.home / f"{STUDY}.toml", str(desk.home / f"{STUDY}-whole.toml")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    draft.write_text(_DRAFT.format(name=STUDY, today=today), encoding="utf-8")
    desk.havengate("study", "plan", str(draft), "--people", str(people), "--out", whole)
    desk.havengate("study", "propose", whole, of="ruth")
    board = ("--as", "ethics-board", "--key", str(desk.home / "board.key"))
    desk.havengate("study", "approve", STUDY, *board, of="emil")
    say("a model", "PHQ-9 ≥ 10 from sleep, activity, demographics; a fifth of all held out")
    told = desk.asked("study", "run", STUDY, of="ruth")
    for line in told["answers"]:
        say("the sites answer", line)
    released = desk.asked("study", "report", STUDY, of="ruth")
    _released(released, say)
    _compared(sites, say)
    say("learning took", f"{time.monotonic() - began:.0f} s")


def _released(told: dict[str, Any], say: Say) -> None:
    [answer], [model] = told["answers"], told["models"]
    auc = next(one for one in answer["estimates"] if one["name"] == "AUC")
    say(
        "AUC",
        f"{auc['value']:.3f} (95 %: {auc['low']:.3f} to {auc['high']:.3f}), asked of people whom "
        "it never saw",
    )
    cost, audit = model["cost"], model["audit"]
    say(
        "what it cost",
        f"each person ε = {cost['epsilon']:.3g} at δ = {cost['delta']:g} for the model, "
        f"ε = {answer['cost']['epsilon']:.3g} to judge it",
    )
    say(
        "audit of the noise",
        f"{audit['correct']} of {audit['guesses']} guesses right: ε is at least "
        f"{audit['lower_bound']:.2f} (95 %), {cost['epsilon']:.3g} is claimed",
    )
    say("the report", os.path.relpath(told["report"]))


def _compared(sites: Sequence[Path], say: Say) -> None:
    """The same people, the same model, with less privacy: simulated, as a researcher would."""
    import secrets

    import numpy as np

    from federated.simulation.devices import devices_of
    from federated.simulation.training import Course, Population, Target, simulate

    query, seed = _query(), secrets.token_bytes(32)
    parts = [list(_read(site, query)) for site in sites]
    devices = devices_of(query.spec, [rows for part in parts for rows, _ in part])
    trained = np.array([trained for part in parts for _, trained in part])
    held_out = np.flatnonzero(~trained)
    of = np.repeat(np.arange(len(sites)), [len(part) for part in parts])

    def auc(whom: Any, noise: Target | None, rounds: int) -> float:
        people = Population(spec=query.spec, devices=devices, train=whom, held_out=held_out)
        course = Course(strategy=query.strategy, rounds=rounds)
        return people.score(simulate(people, course, noise=noise, seed=seed, judged=False).weights)

    everybody = np.flatnonzero(trained)
    private = auc(everybody, Target(epsilon=2.0, delta=1e-5), query.rounds)
    alone = [auc(np.flatnonzero(trained & (of == site)), None, _LONG) for site in range(len(sites))]
    say(
        "in one place",
        f"AUC {auc(everybody, None, _LONG):.3f} without privacy, {private:.3f} at the same ε, if "
        "one saw all rows (these are public)",
    )
    say("each site alone", f"AUC {' · '.join(f'{one:.3f}' for one in alone)}, without privacy")


def _query() -> TrainQuery:
    import tomllib

    from federated.learning.declare import learning_from
    from federated.learning.round_query import TrainQuery

    draft = tomllib.loads(_DRAFT.format(name=STUDY, today="2026-01-01"))
    query = learning_from(draft["queries"][0]["ask"])
    if not isinstance(query, TrainQuery):
        raise SystemExit("The demo's model is no training.")
    return query


def _read(site: Path, query: TrainQuery) -> Iterator[tuple[PersonRows, bool]]:
    """A site's rows, each with whether the study trained on that person."""
    import numpy as np

    from federated.learning.models import parameters
    from federated.node.keeper import FileKeeper
    from federated.node.store import Store

    asked = query.at(np.zeros(parameters(query.spec)))
    store = Store.open(site / "device.store", FileKeeper(site / "device.keys"))
    try:
        for person in store.people():
            trained = asked.asks(study=STUDY, tag=store.tag(person))
            yield store.rows(person, query.columns), trained
    finally:
        store.close()
