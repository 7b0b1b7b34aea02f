"""What a whole training costs each person, and the noise that a cost needs.

Lives here: the sensitivity of all rounds' vectors stacked, and from it ε at δ. A training is *one*
discrete Gaussian release of that stacked vector, spread over time. Not here: what one round's
vector can be moved by (`round_query`, `clipping`), the factors (`factorisation`), the bound itself
(`accounting`: zCDP, exact for the discrete Gaussian).

Unit: the person. Adjacency: zero-out. Updates may depend on earlier answers, as they do through the
weights: given what was released before, a round is a discrete Gaussian release whose Rényi
divergence at each order a is at most a·l2²/(2·scale²) with the l2 of the person's vector in that
round, and along every course of events the squares add up to the stacked bound (Bun and Steinke
2016 for costs fixed round by round; Feldman and Zrnic 2021, the Rényi filter, where only their sum
is fixed, as with DP-FTRL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from federated.accounting import calibrate, compose, cost_of
from federated.errors import AccountingError
from federated.learning.factorisation import IDENTITY, Factors, Participation
from federated.model import NoisePlan, PrivacyCost, Sensitivity


def stacked(
    update: Sensitivity, *, participation: Participation, factors: Factors = IDENTITY
) -> Sensitivity:
    """Of all rounds' vectors of one person together, in the integers that are sent.

    `update` is that of one round's rounded vector, a joined count included. Everybody in every
    round: l2·√rounds. With factors: l2 times the norm proven in `factorisation`, which covers
    missed rounds, late joining and lost pasts. l1 follows from the columns' sums.
    """
    norm = math.sqrt(factors.squared_sensitivity(participation))
    most = participation.times * sum(factors.coefficients)
    return Sensitivity(
        l1=math.nextafter(update.l1 * most, math.inf),
        l2=math.nextafter(update.l2 * norm * (1 + 2.0**-50), math.inf),
    )


def training_cost(
    noise: NoisePlan,
    update: Sensitivity,
    *,
    participation: Participation,
    factors: Factors = IDENTITY,
    delta: float,
    closeness: float = 0.0,
) -> PrivacyCost:
    """What a training of all rounds costs; compose it with other releases by `accounting.compose`.

    `noise`: what each round's sum carries. `closeness`: of one round's noise, over its vector; it
    counts once a round. The cost is that of all rounds announced, also for who took part in fewer
    and where training stopped early. Raises `AccountingError` for noise that is not Gaussian or a
    cost without a bound.
    """
    if noise.mechanism != "discrete_gaussian":
        raise AccountingError(
            "A training's rounds are composed as discrete Gaussian releases only."
        )
    whole = stacked(update, participation=participation, factors=factors)
    return cost_of(noise, whole, delta=delta, closeness=closeness * participation.rounds)


def training_noise(
    update: Sensitivity,
    *,
    participation: Participation,
    factors: Factors = IDENTITY,
    epsilon: float,
    delta: float,
    closeness: float = 0.0,
) -> NoisePlan:
    """The smallest noise of each round's sum at which the whole training costs at most ε and δ."""
    return calibrate(
        "discrete_gaussian",
        stacked(update, participation=participation, factors=factors),
        epsilon=epsilon,
        delta=delta,
        closeness=closeness * participation.rounds,
    )


def epsilon_so_far(
    noise: NoisePlan,
    update: Sensitivity,
    *,
    participation: Participation,
    done: int,
    factors: Factors = IDENTITY,
    delta: float,
    others: Sequence[PrivacyCost] = (),
) -> float:
    """ε at δ of what the first `done` rounds have said, with `others` released beside them.

    For progress. It is what was revealed to who saw these rounds and no more; what was reserved is
    that of all rounds, and stays spent.
    """
    if not done:
        return compose(others, delta=delta)
    first = training_cost(
        noise, update, participation=participation.until(done), factors=factors, delta=delta
    )
    return compose((first, *others), delta=delta)
