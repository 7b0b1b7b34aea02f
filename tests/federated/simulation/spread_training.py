"""Run by `test_flower` with a Python that has Ray: a training here and the same spread on Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from federated.simulation.flower import Spread, simulate_on_ray
from federated.simulation.training import Course, Simulated, Target, divided, simulate
from tests.federated.learning.test_baselines import SPEC, people

TARGET = Target(epsilon=4.0, delta=1e-4)


def told(run: Simulated) -> dict[str, object]:
    steps = [(step.people, step.silent, step.clipped) for step in run.trace]
    return {"weights": run.weights.tolist(), "trace": steps}


def main(folder: Path) -> None:
    found: dict[str, dict[str, object]] = {}
    group = divided(SPEC, people(60, 1))
    for name, course in (
        ("real", Course(rounds=3, cohort=31, absent=0.1)),
        ("exact", Course(rounds=2, exact=True)),
    ):
        here = simulate(group, course, noise=TARGET, seed=b"x")
        spread = Spread(folder=folder / name, clients=3)
        there = simulate_on_ray(group, course, noise=TARGET, seed=b"x", spread=spread)
        found[name] = {"here": told(here), "there": told(there)}
    print("FOUND " + json.dumps(found), flush=True)  # noqa: T201 - it is read by the test


if __name__ == "__main__":
    main(Path(sys.argv[1]))
