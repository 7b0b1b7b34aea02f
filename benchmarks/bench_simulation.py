"""How many devices a second are simulated, beside pfl and Flower's own simulation.

`learning.clients_per_s`: devices' training in one second, whole rounds with clipping, exact noise
and step (`simulation.training.simulate`), float64. `learning.clients_per_s_float32`: the same in
the peers' precision. `learning.clients_per_s_ratio_to_pfl`, `…_to_flower`: float64 over the peer's
float32, ours being the mean of just before and just after the peer. The work is `learning_work`'s,
and what all three end with is compared, so that it is the same. Peers run in environments of their
own; of their time only rounds after the first count.
`learning.million_devices_round_s`: one round of 1,000,000 devices with 120 rows each on a GPU, if
there is one; else `learning.hundred_thousand_devices_round_s` on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import learning_work as work
from benchmarks.harness import Result
from benchmarks.learning_work import Floats
from benchmarks.peers import python_of, ray_python
from federated.learning.models import parameters
from federated.learning.spec import Examples, Feature, Label, TrainSpec, Work
from federated.model import NoisePlan
from federated.simulation.devices import Devices, Precision, pack
from federated.simulation.training import Course, Population, simulate
from federated.simulation.vectorised import Vectorised

ROUNDS = 3
OURS, PFL, FLOWER = 200, 5, 2
ROOT = Path(__file__).resolve().parent.parent
_PFL = ("pfl[pytorch]==0.6.0", f"torch=={torch.__version__.split('+')[0]}")
_PEERS = {"pfl": "pfl 0.6", "flower": "Flower's simulation on Ray"}
_PEER_S = 900
_GPU_BYTES = 8 << 30
#: Of the way from the first weights: noise and single precision take less.
_NEAR = 0.05

SPEC = TrainSpec(
    name="work",
    features=tuple(Feature(column=f"x{k}", low=-1, high=1) for k in range(work.INPUTS)),
    label=Label(column="y", low=0, high=1, at_least=0.5),
    kind="mlp",
    hidden=(work.UNITS,),
    most=work.ROWS,
    work=Work(rate=work.RATE),
    clip=work.CLIP,
)
#: In integers of `SPEC.scale`.
NOISE = NoisePlan(mechanism="discrete_gaussian", scale=work.MULTIPLIER * work.CLIP * SPEC.scale)


def run() -> dict[str, Result]:
    """All three by turns, then one large round."""
    pfl, flower = python_of("pfl", _PFL), ray_python()
    double, single = _devices(work.COHORT, "float64"), _devices(work.COHORT, "float32")
    for devices in (double, single):
        _ours(devices, 2)
    own, single_rates = [_ours(double, OURS)[0]], []
    ratios: dict[str, list[float]] = {name: [] for name in _PEERS}
    rates: dict[str, list[float]] = {name: [] for name in _PEERS}
    for _ in range(ROUNDS):
        single_rates.append(_ours(single, OURS)[0])
        for name, (python, rounds) in {"pfl": (pfl, PFL), "flower": (flower, FLOWER)}.items():
            rate = _checked(_peer(python, f"learning_{name}", rounds), double, rounds)
            own.append(_ours(double, OURS)[0])
            # The machine drifts: before and after the peer.
            ratios[name].append((own[-2] + own[-1]) / 2 / rate)
            rates[name].append(rate)
    unit = "clients/s"
    results = {
        "learning.clients_per_s": Result.of(own, unit=unit),
        "learning.clients_per_s_float32": Result.of(single_rates, unit=unit),
    }
    for name, peer in _PEERS.items():
        results[f"learning.clients_per_s_ratio_to_{name}"] = Result.of(
            ratios[name], unit="ratio", peer=f"{peer}, {unit}", peer_rounds=rates[name]
        )
    return results | _large()


def _devices(count: int, precision: Precision) -> Devices:
    x, y = work.people(count)
    return pack(SPEC, (Examples(x=own, y=labels) for own, labels in zip(x, y, strict=True)),
                precision=precision)  # fmt: skip


def _first() -> Floats:
    weights = np.concatenate([one.ravel() for one in work.first_weights()])
    if weights.shape != (parameters(SPEC),) or len(weights) != work.PARAMETERS:
        raise RuntimeError("The work's network and the specification's are not the same.")
    return weights


def _ours(devices: Devices, rounds: int) -> tuple[float, Floats]:
    """Clients per second over all of it, and the last weights."""
    people = np.arange(len(devices))
    population = Population(spec=SPEC, devices=devices, train=people, held_out=people[:0])
    start = time.perf_counter()
    found = simulate(
        population, Course(rounds=rounds), noise=NOISE, seed=b"bench", judged=False, begin=_first()
    )
    return rounds * len(devices) / (time.perf_counter() - start), found.weights


def _peer(python: Path, module: str, rounds: int) -> tuple[float, Floats]:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray gives way to all else that runs; a peer shall not.
    quiet |= {"RAY_worker_niceness": "0"}
    done = subprocess.run(
        [python, "-c", f"from benchmarks.{module} import main; main({rounds})"],
        cwd=ROOT,
        env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=_PEER_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"rate"')]
    if not lines:
        raise RuntimeError(f"{module} ended without a figure: {done.stderr[-2000:]}")
    found = json.loads(lines[-1])
    return found["rate"], np.array(found["weights"])


def _checked(found: tuple[float, Floats], devices: Devices, rounds: int) -> float:
    """The peer's rate, if it ended where we do: noise moves neither far."""
    rate, weights = found
    _, ours = _ours(devices, rounds + 1)
    way, apart = np.linalg.norm(ours - _first()), np.linalg.norm(ours - weights)
    if apart > _NEAR * way:
        raise RuntimeError(f"A peer did other work: {apart:.3g} apart after a way of {way:.3g}.")
    return rate


def _large() -> dict[str, Result]:
    """One round's sum of very many devices: 10,000 people, each standing for several."""
    gpu = torch.cuda.is_available()
    backend = Vectorised(device="cuda", memory_bytes=_GPU_BYTES) if gpu else Vectorised()
    count, name = (1_000_000, "million") if gpu else (100_000, "hundred_thousand")
    devices = _devices(10_000, "float64")
    asked = np.tile(np.arange(len(devices)), count // len(devices))
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        backend.round_sum(SPEC, _first(), devices, asked)
        took.append(time.perf_counter() - start)
    return {f"learning.{name}_devices_round_s": Result.of(took, unit="s")}
