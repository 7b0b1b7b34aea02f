"""Before a training runs: the noise that its ε and δ need, and how loud it will be.

What a model will be able to do cannot be foreseen without data: choose clip, rate and rounds by
simulation on public data (`federated.simulation`). What is said here is how far noise alone moves
the weights in a round, which is known beforehand.
"""

from __future__ import annotations

import math

from federated.accounting import calibrate, cost_of
from federated.analytics.intervals import carried, noise_moments
from federated.analytics.plan import ExpectedError, QueryPlan
from federated.learning.factorisation import running_noise
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery


def plan_training(
    query: TrainQuery,
    *,
    epsilon: float,
    delta: float,
    people: int,
    level: float = 0.95,
    closeness: float = 0.0,
    weight: float = 1.0,
) -> QueryPlan:
    """Choose each round's noise so that all rounds together cost at most ε at δ.

    `closeness` and `weight` as in `analytics.plan.plan_query`, of all rounds. Raises
    `AccountingError` if no noise keeps to ε and δ.
    """
    noise = calibrate(
        "discrete_gaussian", query.sensitivity, epsilon=epsilon, delta=delta, closeness=closeness
    )
    cost = cost_of(noise, query.sensitivity, delta=delta, closeness=closeness)
    deviation = noise_moments(carried(noise, weight), 1).deviation
    length = deviation * math.sqrt(parameters(query.spec)) / query.spec.scale / people
    of = "a round's mean update"
    if query.turns is not None:
        # Of single rounds it says little: it cancels in their sum, which is where weights go.
        length *= query.turns.gap * running_noise(query.factors, query.rounds)
        of = "the sum of all rounds' mean updates, each over those whose turn it is"
    return QueryPlan(
        query=query.name,
        columns=query.columns,
        noise=noise,
        cost=cost,
        people=people,
        level=level,
        expected=(
            ExpectedError(
                name=f"length of the noise in {of}, of whose people none is longer than "
                f"{query.spec.clip:g}",
                unit="of the weights",
                half_width=length,
                half_width_without_noise=0.0,
            ),
        ),
    )
