"""A simulation spread by Flower on a real Ray gives what one process gives."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import ray_python
from federated.errors import DeploymentError
from federated.learning.round_query import TrainQuery
from federated.simulation.flower import Spread, load, simulate_on_ray, store
from federated.simulation.training import Course, divided
from tests.federated.learning.test_baselines import SPEC, people

ROOT = Path(__file__).parents[3]


def test_devices_come_back_as_they_were_stored(tmp_path: Path) -> None:
    devices = divided(SPEC, people(7, 1)).devices
    store(devices, tmp_path / "devices")
    found = load(tmp_path / "devices")
    for name in ("x", "y", "starts"):
        assert np.array_equal(getattr(found, name), getattr(devices, name))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_refuses_when_ray_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"flwr\[simulation\]"):
        simulate_on_ray(
            divided(SPEC, people(7, 1)), Course(), noise=None, seed=b"x",
            spread=Spread(folder=tmp_path),
        )  # fmt: skip


@pytest.mark.serial
def test_a_training_spread_on_ray_is_the_same_training(tmp_path: Path) -> None:
    try:
        python = ray_python()
    except RuntimeError as error:
        pytest.skip(f"no Python with Ray could be made: {error}")
    done = subprocess.run(
        [python, "-m", "tests.federated.simulation.spread_training", tmp_path],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Ray's workers give way to all else that runs, and the test would wait for them.
            "RAY_worker_niceness": "0",
        },
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    here, there = found["real"]["here"], found["real"]["there"]
    assert there["weights"] == pytest.approx(here["weights"], rel=0, abs=1e-10)
    assert there["trace"] == here["trace"]
    here, there = found["exact"]["here"], found["exact"]["there"]
    # Each person's rounding is off by less than an integer a round, by other chance in each chunk.
    assert there["weights"] == pytest.approx(here["weights"], rel=0, abs=2 / SPEC.scale)
    assert there["trace"][0] == here["trace"][0]
    assert TrainQuery(spec=SPEC).rounding.dimension == len(there["weights"])
