"""What protecting people costs in a step of training at a site, over the same step that protects
nobody: processor time of one thread, 256 people, ghost clipping and hooks by turns with it.

`learning.opacus_overhead_ghost`, `…_hooks`: the sum of clipped gradients over the plain gradient of
the same loss by the same layers in the same precision; an MLP 128-168-1 (as many weights as
336-64-2), one example a person. `learning.opacus_overhead`: hooks, which
are used: ghost clipping bounds nobody (`clipped`).
`…_with_noise`: that and the exact noise of every weight. `….logistic`, `….gru`: the default model
(16 inputs) and a small GRU (7 days), 21 examples a person, by what is used for them.
"""  # noqa: D205 - one sentence that says the question

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional

from benchmarks.harness import Result
from federated.aggregation.bits import SystemBits
from federated.aggregation.noise import sample
from federated.learning.clipped import Clipper, Method, Padded, padded
from federated.learning.models import initial, parameters
from federated.learning.networks import forward
from federated.learning.site import SiteTraining
from federated.learning.spec import Examples, Feature, Label, ModelKind, TrainSpec

PEOPLE = 256
DAYS = 21
ROUNDS = 7
STEPS = 10
CLIP = 0.1
FINENESS = 2.0**24
PEER = "the same step without privacy"

type Step = Callable[[], object]


def run() -> dict[str, Result]:
    """Measure the MLP all ways, then the others as they are used."""
    with _one_thread():
        wide = _spec("mlp", 64, hidden=(168,), indicators=True)
        people, chosen = _people(wide, 1), "hooks"
        ways: dict[str, Step] = {method: _clipped(wide, people, method) for method in _METHODS}
        used = ways[chosen]
        noise = SiteTraining(
            spec=wide, clip=CLIP, rate=0.1, steps=1, divisor=PEOPLE, multiplier=1.0
        ).noise
        ways["with_noise"] = lambda: (
            used(),
            sample(parameters(wide), plan=noise, random=SystemBits()),
        )
        found = {
            f"learning.opacus_overhead_{name}": one
            for name, one in _overheads(_plain(wide, people), ways).items()
        }
        found["learning.opacus_overhead"] = found[f"learning.opacus_overhead_{chosen}"]
        for spec in (_spec("logistic", 16), _spec("gru", 16, hidden=(16,), steps=7)):
            people = _people(spec, DAYS)
            step = _clipped(spec, people, "hooks")
            (found[f"learning.opacus_overhead.{spec.kind}"],) = _overheads(
                _plain(spec, people), {"used": step}
            ).values()
    return found


_METHODS: tuple[Method, ...] = ("ghost", "hooks")


def _overheads(plain: Step, ways: dict[str, Step]) -> dict[str, Result]:
    """Ratios of processor time, all by turns in each round."""
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in ("plain", *ways)}
        for _ in range(STEPS):
            for name, step in (("plain", plain), *ways.items()):
                start = time.process_time()
                step()
                times[name].append(time.process_time() - start)
        for name, rounds in ratios.items():
            rounds.append(statistics.median(times[name]) / statistics.median(times["plain"]))
    return {
        name: Result.of(rounds, unit="ratio", peer=PEER, peer_rounds=[1.0])
        for name, rounds in ratios.items()
    }


def _clipped(spec: TrainSpec, people: Padded, method: Method) -> Step:
    clipper, weights = Clipper(spec, method=method), initial(spec, seed=b"bench")
    return lambda: clipper.clipped_sum(weights, people, clip=CLIP, fineness=FINENESS)


def _plain(spec: TrainSpec, people: Padded) -> Step:
    """The gradient of everybody's mean loss at once, which is all that training needs."""
    start = torch.from_numpy(initial(spec, seed=b"bench"))
    x, y, share = people.x.flatten(0, 1), people.y.flatten(), people.share.flatten()

    def step() -> object:
        weights = start.clone().requires_grad_()
        outputs = forward(spec, weights, x)
        loss = (share * (functional.softplus(outputs) - y * outputs)).sum()
        return torch.autograd.grad(loss, weights)

    return step


def _spec(
    kind: ModelKind,
    features: int,
    *,
    hidden: tuple[int, ...] = (),
    steps: int = 1,
    indicators: bool = False,
) -> TrainSpec:
    return TrainSpec(
        name=kind,
        features=tuple(
            Feature(column=f"c{number}", low=-1, high=1, indicator=indicators)
            for number in range(features)
        ),
        label=Label(column="y", low=0, high=1, at_least=0.5),
        kind=kind,
        hidden=hidden,
        steps=steps,
    )


def _people(spec: TrainSpec, days: int) -> Padded:
    random = np.random.default_rng(1)
    inner = (spec.steps, spec.inputs) if spec.kind == "gru" else (spec.inputs,)
    return padded(
        spec,
        [
            Examples(
                x=random.uniform(-1, 1, (days, *inner)),
                y=random.integers(0, 2, days).astype(np.float64),
            )
            for _ in range(PEOPLE)
        ],
        # Everybody has as many: padding is not what is measured.
        most=days,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
