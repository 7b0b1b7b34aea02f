"""Costs and the plainest accountant, for tests of the node's ledger. Light to import."""

from __future__ import annotations

import math
from collections.abc import Sequence

from federated.model import NoisePlan, PrivacyCost, Sensitivity
from federated.node.budget import Accountant, Contact


class AddingAccountant:
    """The plainest that is right: sums."""

    def __init__(self, delta: float) -> None:
        self._delta = delta

    def compose(self, costs: Sequence[PrivacyCost]) -> float:
        if math.fsum(cost.delta for cost in costs) > self._delta:
            return math.inf
        return math.fsum(cost.epsilon for cost in costs)


def adding(delta: float, adaptive: bool) -> Accountant:  # noqa: FBT001 - the port's signature
    return AddingAccountant(delta)


def contact(run: str, epsilon: float = 0.01) -> Contact:
    return Contact(
        study="study", study_hash="0" * 64, query="q", run=run, round_number=0,
        cost=PrivacyCost(
            epsilon=epsilon, delta=0.0,
            noise=NoisePlan(mechanism="discrete_laplace", scale=1 / epsilon),
            sensitivity=Sensitivity(l1=1.0, l2=1.0),
        ),
    )  # fmt: skip
