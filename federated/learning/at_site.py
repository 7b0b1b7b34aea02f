"""Training at sites: each trains on its own people by DP-SGD, and the changes are averaged.

Lives here: what is declared of it, what it costs, and one site's part of a round. The training
itself is `site` (Opacus clips, everything else is our own), its bound `sampled`.

A site is trusted with its people's rows and adds the noise itself, in every step; so the sum of a
round is released without noise of its own, and secure aggregation hides each site's model from the
others. Unit: the person. Adjacency: zero-out. All steps of all rounds are paid for together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.errors import AccountingError, ManifestError
from federated.learning.sampled import sampled_epsilon
from federated.learning.site import LARGEST_WEIGHT, SiteTraining, train_people
from federated.learning.spec import TrainSpec
from federated.model import NoisePlan, PersonRows, PrivacyCost, RandomBits, Sensitivity

_MOST_STEPS: Final = 10_000
_MORE: Final = 1 + 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class AtSite:
    """How a site trains in each round: `steps` of DP-SGD, each person in a step with `rate`.

    `spec.clip` then bounds a person's gradient in a step, `spec.work.rate` is the step's size along
    their noisy mean, `spec.work.l2` the decay. `least`: nodes with fewer people take no part.
    """

    rate: float
    steps: int
    least: int = 50

    def __post_init__(self) -> None:
        """Raises `ManifestError` for steps that cannot be."""
        if not 0 < self.rate <= 1 or not 1 <= self.steps <= _MOST_STEPS or self.least < 1:
            raise ManifestError(
                f"`at_site` needs a `rate` above 0 and at most 1, 1 to {_MOST_STEPS:,} `steps`, "
                "and `least` of 1 or more."
            )

    def training(
        self, spec: TrainSpec, *, people: int, noise: NoisePlan | None = None
    ) -> SiteTraining:
        """What a site of so many people does in a round. Raises as `SiteTraining`.

        Sums are divided by the people expected in a step, which is public: `people` are known to
        the coordinator, who is held out is a fixed share of them, and nobody is counted by rows.
        """
        found = SiteTraining(
            spec=spec,
            clip=spec.clip,
            rate=self.rate,
            steps=self.steps,
            divisor=self.rate * people * (1 - spec.held_out),
            multiplier=1.0,
            step_size=spec.work.rate,
        )
        if noise is None:
            return found
        return replace(found, multiplier=noise.scale / found.sensitivity.l2)

    def step_sensitivity(self, spec: TrainSpec) -> Sensitivity:
        """Of one step's integers."""
        return self.training(spec, people=1).sensitivity

    def noise_for(self, spec: TrainSpec, multiplier: float) -> NoisePlan:
        """The noise of each step's sum, told in units of what a person can move it by."""
        scale = multiplier * self.step_sensitivity(spec).l2 * _MORE
        return NoisePlan(mechanism="discrete_gaussian", scale=scale)

    def price(self, spec: TrainSpec, noise: NoisePlan, *, rounds: int, delta: float) -> PrivacyCost:
        """What all steps of so many rounds cost a person.

        `noise` is each step's, `sensitivity` that of all steps stacked, which is what a person
        could move if they were in all: others compose it so, or add ε up, whichever is less.
        Raises `AccountingError`.
        """
        if noise.mechanism != "discrete_gaussian":
            raise AccountingError(f"{spec.name}: a step's noise is discrete Gaussian.")
        epsilon = sampled_epsilon(
            multiplier=noise.scale / self.step_sensitivity(spec).l2,
            rate=self.rate,
            steps=rounds * self.steps,
            delta=delta,
        )
        stacked = self.sensitivity(spec, rounds=rounds)
        return PrivacyCost(epsilon=epsilon, delta=delta, noise=noise, sensitivity=stacked)

    def sensitivity(self, spec: TrainSpec, *, rounds: int) -> Sensitivity:
        """Of the integers of all steps of so many rounds, one below the other."""
        one, steps = self.step_sensitivity(spec), rounds * self.steps
        return Sensitivity(l1=one.l1 * steps * _MORE, l2=one.l2 * math.sqrt(steps) * _MORE)

    def bound(self, spec: TrainSpec) -> int:
        """Largest |coordinate| of a site's change, in integers, for each of its people."""
        return math.ceil(2 * LARGEST_WEIGHT * spec.scale) + 1

    def change(
        self,
        spec: TrainSpec,
        weights: NDArray[np.float64],
        rows: Sequence[PersonRows],
        *,
        people: int,
        noise: NoisePlan,
        random: RandomBits,
    ) -> NDArray[np.int64]:
        """A site's change of the weights times its `people`, in integers; (ε, δ)-private by itself.

        `rows` are of those who are trained on. Zeros where the weights that came, or those that
        come of them, are no numbers or too large: that depends on noisy weights alone.
        """
        training = self.training(spec, people=people, noise=noise)
        try:
            found = train_people(training, rows, random=random, start=weights)
        except ManifestError:
            return np.zeros(len(weights), dtype=np.int64)
        return np.rint((found.weights - weights) * spec.scale).astype(np.int64) * people


def verify_torch() -> None:
    """Raise `ManifestError` where torch is missing: such a node cannot train networks."""
    _verify("torch")


def verify_installed() -> None:
    """Raise `ManifestError` where Opacus or torch is missing: no training at such a site."""
    _verify("torch", "opacus")


def _verify(*packages: str) -> None:
    # Only looked for: importing takes seconds, and a greeting is to be answered at once.
    if missing := [one for one in packages if find_spec(one) is None]:
        raise ManifestError(
            f"This needs {' and '.join(missing)}, which is not installed here: install "
            "havengate[learning]."
        )
