"""A secure histogram over ten nodes, from the command's start to the answer; a round of training.

Real processes on this machine: OpenBao's certificates, the SuperLink, ten nodes with five people
each, TLS between them; they are up before. What is timed is a process of its own that does what
`havengate study run` does once somebody has signed in: start the run, greet, reserve in the ledger,
five stages of secure aggregation, decode, spend. `…_inside_s` is the same without the process's own
start (Python and its imports). `learning.round_s` is one round of a training of the default model,
from one set of weights to the next. Flower as shipped took 12.5 s for one plain query of two nodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Result
from federated.signed_study import SignedStudy
from tests.federated.deployment.federation import Running, running
from tests.federated.studies import ORIGIN
from tests.openbao import running_server

NODES = 10
ROUNDS = 3


def run() -> dict[str, Result]:
    """Bring a federation up and ask it again and again."""
    with (
        TemporaryDirectory() as folder,
        running_server(Path(folder)) as bao,
        running(bao, Path(folder), nodes=NODES) as federation,
    ):
        histogram = [
            _ask(federation, federation.approved(), Path(folder)) for _ in range(ROUNDS + 1)
        ]
        training = _ask(federation, federation.agreed(federation.training()), Path(folder))
    # The first finds caches cold that stay warm in nodes that run.
    outside = [one["outside_s"] for one in histogram[1:]]
    inside = [one["inside_s"] for one in histogram[1:]]
    return {
        "federated.secure_histogram_s": Result.of(outside, unit="s"),
        "federated.secure_histogram_inside_s": Result.of(inside, unit="s"),
        "learning.round_s": Result.of(training["rounds_s"], unit="s"),
    }


def _ask(federation: Running, signed: SignedStudy, folder: Path) -> dict[str, Any]:
    study = folder / "study"
    study.write_bytes(signed.encode())
    told: dict[str, Any] = {
        "study": str(study),
        "places": str(federation.places.directory),
        "log": str(federation.log.directory),
        "ledger": f"sqlite:///{folder / 'ledger.sqlite3'}",
        "origin": ORIGIN,
        "address": f"127.0.0.1:{federation.federation.ports.http}",
    }
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.federated_run", json.dumps(told)],
        check=True,
        capture_output=True,
    )
    outside = time.perf_counter() - began
    found: dict[str, Any] = json.loads(done.stdout)
    if found["nodes"] != NODES:
        raise RuntimeError(f"Expected an answer of {NODES} nodes, got {found}.")
    return {**found, "outside_s": outside}
