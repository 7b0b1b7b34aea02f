"""Before a training runs: the noise that its ε and δ need, and how loud it will be.

What a model will be able to do cannot be foreseen without data: choose clip, rate and rounds by
simulation on public data (`federated.simulation`). What is said here is how far noise alone moves
the weights in a round, which is known beforehand.
"""

from __future__ import annotations

import math

from federated.accounting import calibrate
from federated.analytics.intervals import carried, noise_moments
from federated.analytics.plan import ExpectedError, QueryPlan
from federated.learning.at_site import AtSite
from federated.learning.factorisation import running_noise
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery
from federated.learning.sampled import sampled_multiplier


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
    if query.at_site is not None:
        return _at_site(
            query, query.at_site, epsilon=epsilon, delta=delta, people=people, level=level
        )
    noise = calibrate(
        "discrete_gaussian", query.sensitivity, epsilon=epsilon, delta=delta, closeness=closeness
    )
    cost = query.price(noise, delta=delta, closeness=closeness)
    deviation = noise_moments(carried(noise, weight), 1).deviation
    # Who is held out brings nothing.
    brought = people * (1 - query.spec.held_out)
    length = deviation * math.sqrt(parameters(query.spec)) / query.spec.scale / brought
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


def _at_site(
    query: TrainQuery, at_site: AtSite, *, epsilon: float, delta: float, people: int, level: float
) -> QueryPlan:
    """Each step's noise, which sites add: nothing is shared among nodes, so nothing is on top."""
    spec = query.spec
    multiplier = sampled_multiplier(
        epsilon=epsilon, delta=delta, rate=at_site.rate, steps=at_site.steps * query.rounds
    )
    noise = at_site.noise_for(spec, multiplier)
    divisor = at_site.training(spec, people=at_site.least).divisor
    return QueryPlan(
        query=query.name,
        columns=query.columns,
        noise=noise,
        cost=query.price(noise, delta=delta, closeness=0.0),
        people=people,
        level=level,
        expected=(
            ExpectedError(
                name=f"length of the noise in a step's mean gradient at a site of {at_site.least} "
                f"people, of whom none is longer than {spec.clip:g}; with more people less",
                unit="of the gradient",
                half_width=multiplier * spec.clip * math.sqrt(parameters(spec)) / divisor,
                half_width_without_noise=0.0,
            ),
        ),
    )
