"""What releases cost each person: ε at δ of one, of many together, and the noise that a cost needs.

Lives here: the claims. Unit: the person. Adjacency: zero-out (`model.Sensitivity`). Every figure is
an upper bound that is proven for the noise that is really added, which is discrete; a figure that
is only close to the truth is named a reference. Numbers come from Google's dp-accounting.

- *Discrete Laplace*: pure ε = l1/scale. By PLD: the scalar mechanism, whose query moves by l1 in
  one coordinate, dominates every way of spreading l1 over many (proof: `analytics/DESIGN.md`), so
  its privacy loss distribution, rounded up, may be claimed in any dimension.
- *Discrete Gaussian*: rho-zero-concentrated DP with rho = l2²/(2·scale²), exact in any dimension
  (Canonne, Kamath, Steinke 2020, Theorem 4), turned into (ε, δ) by their Corollary 13. The PLD of
  the *continuous* Gaussian is smaller by a tenth or so; it is not claimed, because a lattice can be
  worse than the continuum by a term of order 1/scale² that nobody has bounded for a shift in many
  coordinates: the larger counts. `reference_epsilon` says the smaller, beside.

Composition holds for mechanisms chosen in any order and by earlier answers, as long as the cost of
each was fixed beforehand; where earlier answers also decide what the next release costs, an
`Accountant` with `adaptive=True` adds up instead, which holds always.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Final

from federated.errors import AccountingError
from federated.model import Mechanism, NoisePlan, PrivacyCost, Sensitivity

ADJACENCY: Final = "zero-out"

#: Above this a loss distribution is large and says nothing; the sum of the pure ε counts.
_LARGEST_PLD_EPSILON: Final = 60.0
_FINEST_LOSS_STEP: Final = 1e-4
_MOST_LOSS_STEPS: Final = 1_000_000
#: Shares of δ given to the Laplace releases when both kinds are mixed. Each is a valid bound.
_SPLITS: Final = (0.01, 0.1, 0.5, 0.9, 0.99)
_BISECTIONS: Final = 200
#: So that rounding never takes noise away.
_MORE: Final = 1 + 1e-12


def cost_of(
    noise: NoisePlan, sensitivity: Sensitivity, *, delta: float, closeness: float = 0.0
) -> PrivacyCost:
    """What one release costs, by itself.

    `delta` is what may be spent on it. `closeness` bounds the total variation distance between the
    noise that is really added (shares of it, a modulus that may wrap around) and the planned one,
    over the whole vector: it adds (1 + e^ε)·closeness to δ. Discrete Laplace noise by itself
    needs no δ, and the cost then says only what closeness takes.

    Raises `AccountingError` where the cost cannot be bounded.
    """
    _check_release(noise, sensitivity)
    _check_probability("delta", delta)
    _check_probability("closeness", closeness)
    if noise.mechanism == "discrete_laplace":
        epsilon = sensitivity.l1 / noise.scale
        spent = _with_closeness(epsilon, closeness)
        if spent > delta:
            raise AccountingError(
                f"The noise is not close enough to what was planned: δ ≤ {delta:g} was asked for, "
                f"and the distance alone takes {spent:g}. Allow more δ, or finer shares."
            )
    else:
        epsilon = _solve_with_closeness(
            lambda left: _zcdp_epsilon(_rho(noise, sensitivity), left), delta, closeness
        )
        spent = delta
    return PrivacyCost(
        epsilon=epsilon, delta=spent, noise=noise, sensitivity=sensitivity, closeness=closeness
    )


def calibrate(
    mechanism: Mechanism,
    sensitivity: Sensitivity,
    *,
    epsilon: float,
    delta: float = 0.0,
    closeness: float = 0.0,
) -> NoisePlan:
    """The smallest noise of that kind whose release costs at most ε and δ.

    Raises `AccountingError` if no noise does: a Gaussian with δ = 0, or a closeness above δ.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise AccountingError(f"ε must be a positive number, not {epsilon}.")
    _check_probability("delta", delta)
    _check_probability("closeness", closeness)
    _check_sensitivity(sensitivity)
    left = delta - _with_closeness(epsilon, closeness)
    if left < 0:
        raise AccountingError(
            f"δ = {delta:g} is less than what the noise's closeness takes at ε = {epsilon:g}."
        )
    if mechanism == "discrete_laplace":
        scale = sensitivity.l1 / epsilon
        while sensitivity.l1 / scale > epsilon:
            scale = math.nextafter(scale, math.inf)
        return NoisePlan(mechanism=mechanism, scale=scale)
    if mechanism != "discrete_gaussian":
        raise AccountingError(f"There is no mechanism {mechanism!r} whose cost is known.")
    if left <= 0:
        raise AccountingError("Discrete Gaussian noise needs a δ above 0; use discrete Laplace.")
    rho = _bisect(lambda value: _zcdp_delta(value, epsilon) <= left, 0.0, epsilon)
    scale = sensitivity.l2 / math.sqrt(2 * rho) * _MORE
    return NoisePlan(mechanism=mechanism, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accountant:
    """Adds up costs at one `delta`. `adaptive`: costs may depend on earlier answers."""

    delta: float
    adaptive: bool = False

    def __post_init__(self) -> None:
        _check_probability("delta", self.delta)

    def compose(self, costs: Sequence[PrivacyCost]) -> float:
        """An ε such that all releases together are (ε, `delta`)-DP per person, zero-out.

        Never below the truth: the smallest of several proven bounds (sum of pure ε, PLD of the
        Laplace releases rounded up, zCDP of the Gaussian ones, splits of δ between both, RDP, and
        what each costs by itself added up).
        Raises `AccountingError` where none can be given.
        """
        if self.adaptive:
            return _added_up(costs, self.delta)
        return compose(costs, delta=self.delta)


def compose(costs: Sequence[PrivacyCost], *, delta: float) -> float:
    """As `Accountant.compose`. The order does not matter, and equal costs are cached."""
    _check_probability("delta", delta)
    counted: Counter[tuple[NoisePlan, Sensitivity]] = Counter()
    for cost in costs:
        _check_release(cost.noise, cost.sensitivity)
        _check_probability("closeness", cost.closeness)
        counted[cost.noise, cost.sensitivity] += 1
    if not counted:
        return 0.0
    added = _stated(costs, delta)
    try:
        found = _compose(
            frozenset(counted.items()), math.fsum(cost.closeness for cost in costs), delta
        )
    except AccountingError:
        if not math.isfinite(added):
            raise
        return added
    return min(found, added)


def _stated(costs: Sequence[PrivacyCost], delta: float) -> float:
    """What the costs say by themselves, added up; infinite where that is more than δ allows.

    Sampling makes a release cheaper by itself than its noise and sensitivity say. What carries
    noise that others share is held against its own figures first.
    """
    if not all(math.isfinite(cost.epsilon) and cost.epsilon >= 0 for cost in costs):
        return math.inf
    if not all(0 <= cost.delta < 1 for cost in costs):
        return math.inf
    if math.fsum(cost.delta for cost in costs) > delta:
        return math.inf
    for cost in costs:
        if cost.closeness:
            try:
                own = _own_epsilon(cost.noise, cost.sensitivity, cost.delta, cost.closeness)
            except AccountingError:
                return math.inf
            if own > cost.epsilon * _MORE:
                return math.inf
    return math.fsum(cost.epsilon for cost in costs)


@lru_cache(maxsize=1024)
def _own_epsilon(
    noise: NoisePlan, sensitivity: Sensitivity, delta: float, closeness: float
) -> float:
    return cost_of(noise, sensitivity, delta=delta, closeness=closeness).epsilon


def compose_by_rdp(costs: Sequence[PrivacyCost], *, delta: float) -> float:
    """The same by Rényi DP alone: another proven bound, by other means, to check the first with."""
    counted = Counter((cost.noise, cost.sensitivity) for cost in costs)
    closeness = math.fsum(cost.closeness for cost in costs)
    return _solve_with_closeness(
        lambda left: _rdp_epsilon(frozenset(counted.items()), left), delta, closeness
    )


def reference_epsilon(noise: NoisePlan, sensitivity: Sensitivity, *, delta: float) -> float:
    """ε of the *continuous* mechanism of the same scale (Balle and Wang 2018 for the Gaussian).

    For comparison with figures that others publish. It is not a bound on what is really added.
    """
    from dp_accounting import gaussian_mechanism
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_release(noise, sensitivity)
    if noise.mechanism == "discrete_gaussian":
        return float(gaussian_mechanism.get_epsilon_gaussian(noise.scale / sensitivity.l2, delta))
    loss = pld.from_laplace_mechanism(noise.scale / sensitivity.l1)
    return float(loss.get_epsilon_for_delta(delta))


@lru_cache(maxsize=1024)
def _compose(
    counted: frozenset[tuple[tuple[NoisePlan, Sensitivity], int]], closeness: float, delta: float
) -> float:
    laplace = frozenset(item for item in counted if item[0][0].mechanism == "discrete_laplace")
    gaussian = counted - laplace
    if not closeness and not delta and gaussian:
        raise AccountingError("Gaussian releases have no ε at δ = 0; give a δ above 0.")
    return _solve_with_closeness(
        lambda left: _smallest_bound(laplace, gaussian, left), delta, closeness
    )


def _smallest_bound(
    laplace: frozenset[tuple[tuple[NoisePlan, Sensitivity], int]],
    gaussian: frozenset[tuple[tuple[NoisePlan, Sensitivity], int]],
    delta: float,
) -> float:
    pure = math.fsum(count * s.l1 / noise.scale for (noise, s), count in laplace)
    rho = math.fsum(count * _rho(noise, s) for (noise, s), count in gaussian)
    if not gaussian:
        if delta <= 0 or pure > _LARGEST_PLD_EPSILON * len(laplace):
            return pure
        return min(pure, _laplace_pld_epsilon(laplace, delta))
    bounds = [pure + _zcdp_epsilon(rho, delta)]
    if laplace:
        bounds += [
            _laplace_pld_epsilon(laplace, delta * share) + _zcdp_epsilon(rho, delta * (1 - share))
            for share in _SPLITS
        ]
        bounds.append(_rdp_epsilon(laplace | gaussian, delta))
    return min(bounds)


def _added_up(costs: Sequence[PrivacyCost], delta: float) -> float:
    """Basic composition, which holds even where each cost was chosen by earlier answers."""
    for cost in costs:
        _check_release(cost.noise, cost.sensitivity)
        _check_probability("delta", cost.delta)
        if not cost.epsilon >= 0:
            raise AccountingError(f"A cost's ε is 0 or more, not {cost.epsilon}.")
    spent = math.fsum(cost.delta for cost in costs)
    if spent > delta:
        raise AccountingError(
            f"The releases' δ add up to {spent:g}, more than {delta:g}: no ε can be said at it."
        )
    return math.fsum(cost.epsilon for cost in costs)


def _laplace_pld_epsilon(
    laplace: frozenset[tuple[tuple[NoisePlan, Sensitivity], int]], delta: float
) -> float:
    # Importing dp-accounting takes seconds, and what a coordinator reserves does not need it.
    from dp_accounting.pld import privacy_loss_distribution as pld

    epsilons = [s.l1 / noise.scale for (noise, s), _ in laplace]
    if max(epsilons) > _LARGEST_PLD_EPSILON:
        return math.inf
    total = sum(e * count for e, (_, count) in zip(epsilons, laplace, strict=True))
    step = max(_FINEST_LOSS_STEP, total / _MOST_LOSS_STEPS)
    losses = [
        pld.from_discrete_laplace_mechanism(
            1 / noise.scale,
            sensitivity=max(1, math.floor(sensitivity.l1)),
            value_discretization_interval=step,
        ).self_compose(count)
        for (noise, sensitivity), count in laplace
    ]
    composed = reduce(lambda a, b: a.compose(b), losses)
    return float(composed.get_epsilon_for_delta(delta))


def _rdp_epsilon(
    counted: frozenset[tuple[tuple[NoisePlan, Sensitivity], int]], delta: float
) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    orders = tuple(float(order) for order in rdp.DEFAULT_RDP_ORDERS)
    totals = [
        math.fsum(count * _renyi(noise, s, order) for (noise, s), count in counted)
        for order in orders
    ]
    epsilon, _ = rdp.compute_epsilon(orders, totals, delta)
    return float(epsilon)


def _renyi(noise: NoisePlan, sensitivity: Sensitivity, order: float) -> float:
    """Rényi divergence of that order between neighbours, exact for the worst neighbour.

    The loss of the scalar discrete Laplace takes the values (Δ - 2j)/scale for j = 0 … Δ, with
    r = exp(-1/scale): 1/(1+r) at j = 0, r^Δ/(1+r) at j = Δ, (1-r)/(1+r)·r^j between.
    """
    if noise.mechanism == "discrete_gaussian":
        return order * _rho(noise, sensitivity)
    shift = max(1, math.floor(sensitivity.l1))
    rate = 1 / noise.scale
    lift = (order - 1) * shift * rate
    step = (2 * order - 1) * rate
    inner = 0.0
    if shift > 1:
        inner = -math.expm1(-rate) * math.exp(-step) * -math.expm1(-step * (shift - 1))
        inner /= -math.expm1(-step)
    tail = math.exp(-step * shift)
    return (lift + math.log(1 + inner + tail) - math.log1p(math.exp(-rate))) / (order - 1)


def _rho(noise: NoisePlan, sensitivity: Sensitivity) -> float:
    return (sensitivity.l2 / noise.scale) ** 2 / 2


def _zcdp_epsilon(rho: float, delta: float) -> float:
    """The smallest ε at which rho-zCDP gives δ (Canonne, Kamath, Steinke 2020, Corollary 13)."""
    if rho == 0:
        return 0.0
    if delta <= 0:
        return math.inf
    if _zcdp_delta(rho, 0.0) <= delta:
        return 0.0
    # Bun and Steinke 2016 is larger: a bound to search below.
    high = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    return _bisect(lambda epsilon: _zcdp_delta(rho, epsilon) > delta, 0.0, high, upper=True)


def _zcdp_delta(rho: float, epsilon: float) -> float:
    """The least of exp((a-1)(a·rho-ε))/(a-1)·(1-1/a)^a over a > 1; any a gives a valid bound."""

    def slope(alpha: float) -> float:
        return (2 * alpha - 1) * rho - epsilon + math.log1p(-1 / alpha)

    if rho == 0:
        return 0.0
    high = (epsilon + 1) / (2 * rho) + 2
    alpha = _bisect(lambda value: slope(value) < 0, 1 + 1e-9, high)
    exponent = (alpha - 1) * (alpha * rho - epsilon) + alpha * math.log1p(-1 / alpha)
    return min(1.0, math.exp(exponent) / (alpha - 1)) if exponent < 0 else 1.0


def _bisect(
    keeps: Callable[[float], bool], low: float, high: float, *, upper: bool = False
) -> float:
    """Where `keeps`, true at first, turns false: the last that keeps, or else the next above."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return high if upper else low


def _with_closeness(epsilon: float, closeness: float) -> float:
    if closeness == 0:
        return 0.0
    return (1 + math.exp(min(epsilon, 700.0))) * closeness


def _solve_with_closeness(
    epsilon_at: Callable[[float], float], delta: float, closeness: float
) -> float:
    """The smallest ε = epsilon_at(δ - (1 + e^ε)·closeness), from below.

    What is returned is proven: the equation holds at it, or less is due than it says. Raises
    `AccountingError` where no ε is enough, and where that is not settled.
    """
    epsilon = epsilon_at(delta)
    for _ in range(_BISECTIONS):
        if not math.isfinite(epsilon):
            raise AccountingError(f"No finite ε can be said at δ = {delta:g}; give a larger δ.")
        taken = _with_closeness(epsilon, closeness)
        if taken == 0:
            return epsilon
        if taken >= delta:
            raise AccountingError(
                f"The noise's closeness takes all of δ = {delta:g} at ε = {epsilon:g}: the cost is "
                "not bounded. Allow more δ, or finer shares."
            )
        higher = epsilon_at(delta - taken)
        if higher <= epsilon:
            return epsilon
        # A hair more, so that steps that only shrink come to an end.
        epsilon = higher * _MORE
    raise AccountingError(
        f"What the noise's closeness takes of δ = {delta:g} is not settled at ε = {epsilon:g}: the "
        "cost may not be bounded. Allow more δ, or finer shares."
    )


def _check_release(noise: NoisePlan, sensitivity: Sensitivity) -> None:
    if noise.mechanism not in {"discrete_laplace", "discrete_gaussian"}:
        raise AccountingError(f"There is no mechanism {noise.mechanism!r} whose cost is known.")
    if not (math.isfinite(noise.scale) and noise.scale > 0):
        raise AccountingError(
            f"The noise's scale must be a positive number, not {noise.scale}: without noise the "
            "cost is unbounded."
        )
    _check_sensitivity(sensitivity)


def _check_sensitivity(sensitivity: Sensitivity) -> None:
    for name, value in (("l1", sensitivity.l1), ("l2", sensitivity.l2)):
        if not (math.isfinite(value) and value > 0):
            raise AccountingError(f"The sensitivity's {name} must be positive, not {value}.")
    if sensitivity.l2 > sensitivity.l1 * (1 + 1e-9):
        raise AccountingError("A sensitivity's l2 is never larger than its l1.")


def _check_probability(name: str, value: float) -> None:
    if not (math.isfinite(value) and 0 <= value < 1):
        raise AccountingError(f"{name} must be at least 0 and below 1, not {value}.")
