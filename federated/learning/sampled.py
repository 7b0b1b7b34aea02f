"""What training on random people costs: Poisson-sampled discrete Gaussian sums, step after step.

In each step everybody is in it with probability `rate`, independently, and the sum of those who are
carries discrete Gaussian noise of `multiplier` times its l2. Unit: what is sampled. Adjacency:
zero-out. The number that sums are divided by is fixed beforehand; so zeros for somebody and their
not being drawn are the same sum, and zero-out is add/remove here, with the same sensitivity.

The bound holds for the noise that is really added, which is discrete, in any dimension:

- Given who else is sampled, a step is (1-q)·P + q·Q against P, P and Q discrete Gaussians a whole
  vector apart. E_P[((1-q) + q·Q/P)^a] for a whole a is the binomial sum of C(a,k)·(1-q)^(a-k)·q^k
  times E_P[(Q/P)^k] ≤ exp(k(k-1)·l2²/(2·scale²)), as for the continuous Gaussian, by zCDP of the
  discrete one (Canonne, Kamath, Steinke 2020, Theorem 4).
- The other direction is never larger: the proof (Mironov, Talwar, Zhang 2019, Theorem 5) needs a
  measure-preserving reflection that swaps P and Q; for a whole vector v apart, v - z is one.
- Over who else is sampled the divergence is quasi-convex; steps compose by Rényi's filter.

So Rényi orders are whole numbers. ε by dp-accounting's conversion (Canonne et al. 2020).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

from federated.accounting import cost_of
from federated.errors import AccountingError
from federated.model import NoisePlan, Sensitivity

#: Any whole order above 1 gives a bound; these are dense where a best one lies.
_ORDERS: Final = (*range(2, 65), *range(72, 257, 8), 320, 384, 512, 768, 1024)
_MOST_STEPS: Final = 1_000_000
_MOST_MULTIPLIER: Final = 2.0**15
#: A multiplier is found to this share of itself, from above.
_CLOSE: Final = 1e-4
#: So that rounding never makes a claim smaller.
_MORE: Final = 1 + 1e-9


def sampled_epsilon(*, multiplier: float, rate: float, steps: int, delta: float) -> float:
    """A proven ε at `delta` of all `steps`. Raises `AccountingError` where none can be given.

    Never more than the same steps cost without sampling: what sampling hides only helps.
    """
    _check(multiplier=multiplier, rate=rate, steps=steps, delta=delta)
    return _epsilon(multiplier, rate, steps, delta)


def sampled_multiplier(*, epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise, in units of l2, at which all steps together cost at most (ε, δ).

    To 0.01 %, and never below. Raises `AccountingError` if no noise that can be drawn does.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise AccountingError(f"ε must be a positive number, not {epsilon}.")
    high = 1.0
    while sampled_epsilon(multiplier=high, rate=rate, steps=steps, delta=delta) > epsilon:
        high *= 2
        if high > _MOST_MULTIPLIER:
            raise AccountingError(
                f"No noise makes {steps} steps cost ε = {epsilon:g} at δ = {delta:g}: allow more, "
                "or take fewer steps."
            )
    low = high / 2
    while sampled_epsilon(multiplier=low, rate=rate, steps=steps, delta=delta) <= epsilon:
        low, high = low / 2, low
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        holds = sampled_epsilon(multiplier=middle, rate=rate, steps=steps, delta=delta) <= epsilon
        low, high = (low, middle) if holds else (middle, high)
    return high


def sampled_reference(*, multiplier: float, rate: float, steps: int, delta: float) -> float:
    """ε of the *continuous* mechanism by its privacy loss distribution, rounded up.

    For comparison with figures that others publish. It is not a bound on what is really added.
    """
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    _check(multiplier=multiplier, rate=rate, steps=steps, delta=delta)
    accountant = PLDAccountant().compose(_event(multiplier, rate, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _epsilon(multiplier: float, rate: float, steps: int, delta: float) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    one = Sensitivity(l1=math.sqrt(steps), l2=math.sqrt(steps))
    unsampled = cost_of(
        NoisePlan(mechanism="discrete_gaussian", scale=multiplier), one, delta=delta
    ).epsilon
    accountant = RdpAccountant(orders=_ORDERS).compose(_event(multiplier, rate, steps))
    return min(float(accountant.get_epsilon(delta)), unsampled) * _MORE


def _event(multiplier: float, rate: float, steps: int) -> Any:
    from dp_accounting import dp_event

    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(multiplier))
    return dp_event.SelfComposedDpEvent(step, steps)


def _check(*, multiplier: float, rate: float, steps: int, delta: float) -> None:
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise AccountingError(
            f"The noise multiplier must be a positive number, not {multiplier}: without noise the "
            "cost is unbounded."
        )
    if not 0 < rate <= 1:
        raise AccountingError(f"A sampling rate is above 0 and at most 1, not {rate}.")
    if not 1 <= steps <= _MOST_STEPS:
        raise AccountingError(f"Expected 1 to {_MOST_STEPS:,} steps, got {steps}.")
    if not 0 < delta < 1:
        raise AccountingError(f"δ of Gaussian noise is above 0 and below 1, not {delta}.")
