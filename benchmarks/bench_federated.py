"""A secure histogram over ten nodes, from the start of the command's process to the answer.

Real processes on this machine: OpenBao's certificates, the SuperLink, ten nodes with five people
each, TLS between them; they are up before. What is timed is a process of its own that does what
`havengate study run` does once somebody has signed in: start the run, greet, reserve in the ledger,
five stages of secure aggregation, decode, spend. `…_inside_s` is the same without the process's own
start (Python and its imports). Flower as shipped took 12.5 s for one plain query of two nodes.
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
        measured = [_ask(federation, Path(folder)) for _ in range(ROUNDS + 1)]
    # The first finds caches cold that stay warm in nodes that run.
    outside, inside = zip(*measured[1:], strict=True)
    return {
        "federated.secure_histogram_s": Result.of(list(outside), unit="s"),
        "federated.secure_histogram_inside_s": Result.of(list(inside), unit="s"),
    }


def _ask(federation: Running, folder: Path) -> tuple[float, float]:
    signed = federation.approved()
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
    found = json.loads(done.stdout)
    if found["nodes"] != NODES:
        raise RuntimeError(f"Expected an answer of {NODES} nodes, got {found}.")
    return outside, found["inside_s"]
