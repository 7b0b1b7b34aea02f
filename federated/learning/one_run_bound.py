"""How much ε correct guesses prove: the statistics of an audit of one run, and what it can find.

Lives here: the p-value of so many correct guesses, the lower bound of ε that follows, how many
guesses to make, and what bound to expect. Not here: canaries (`canaries`), who is guessed to be in
(`privacy_audit`). Pure; of numbers alone.

Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023), Theorem
5.2 and Corollary 5.4. Of m people each is in or out by a fair coin of their own. Who sees only the
release and guesses r of these coins, r fixed beforehand, has of a release that is (ε, δ)-private
per person (zero-out) at least v of them right with probability at most

    β + 2·m·δ·A,    β = P[W ≥ v],    A = max over 1 ≤ i ≤ v of P[v > W ≥ v - i]/i,

with W binomial of r tries at e^ε/(1 + e^ε). The second term is what δ may give away: without it the
bound is too high. It counts all m canaries, those that are not guessed at too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from federated.accounting import calibrate
from federated.model import Sensitivity

#: Which share of the claimed noise the number of guesses is chosen for: about the largest that a
#: bound from a thousand canaries finds out.
TUNED_FOR: Final = 1 / 3
_BISECTIONS: Final = 32
_CHOICES: Final = 16
_QUADRATURE: Final = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What an audit finds if the noise is `noise_share` times the claimed deviation.

    `expected_bound`: mean of the lower bound of ε. `chance`: of a bound above the claim. Both
    after the continuous Gaussian and with guesses taken for independent: for choosing, no proof.
    """

    canaries: int
    guesses: int
    noise_share: float
    expected_bound: float
    chance: float


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability that so many of `guesses` are right though (ε, δ) holds; 1 at most.

    Raises ValueError for counts or parameters that no audit has.
    """
    from scipy.stats import binom

    _check(canaries, guesses, correct, delta)
    if not epsilon >= 0:
        raise ValueError(f"expected ε of 0 or more, got {epsilon}")
    if not correct:
        return 1.0
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    if not delta:
        return beta
    # Sums of masses from the top down: differences of tails would lose what is left of them.
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    alpha = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The ε below which no (ε, `delta`) holds, with that confidence; 0 where nothing is proven.

    Whatever (ε, δ) the release really has, the bound is above that ε with probability at most
    1 - `confidence`. Rounded down; p-values rise with ε (a test goes over them), so bisection finds
    where they pass 1 - `confidence`.
    """
    _check(canaries, guesses, correct, delta)
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence above 0 and below 1, got {confidence}")

    def refuted(epsilon: float) -> bool:
        p = p_value(
            canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta
        )
        return p <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@lru_cache(maxsize=256)
def guesses_for(canaries: int, *, epsilon: float, delta: float) -> int:
    """How many of `canaries` to guess: a public rule of numbers known before the first round.

    Half of them "in", half "out": an even number. The one with the largest bound to be expected at
    95 % if `TUNED_FOR` of the claimed noise is drawn. Choosing by what was seen instead would need
    a bound over all choices. Raises `AccountingError` for a claim that Gaussian noise cannot keep,
    as one at δ = 0.
    """
    if canaries < 2:  # noqa: PLR2004 - one to guess in, one to guess out
        raise ValueError(f"expected 2 canaries or more, got {canaries}")
    distance = _distance(epsilon, delta) / TUNED_FOR
    largest = canaries // 2
    choices = {
        2 * max(1, round(largest * share)) for share in np.geomspace(0.02, 1.0, _CHOICES).tolist()
    }

    def expected(guesses: int) -> tuple[float, int]:
        correct = math.floor(guesses * _accuracy(distance, guesses / canaries))
        bound = lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=delta)
        return bound, guesses

    return max(choices, key=expected)


def power(
    canaries: int,
    *,
    epsilon: float,
    delta: float,
    confidence: float = 0.95,
    noise_share: float = 1.0,
) -> Power:
    """What an audit of a claim of ε at δ can find: how high a bound, and whether above the claim.

    With `noise_share` 1 the claim is kept, and the bound says how near to it an audit comes.
    """
    from scipy.stats import binom

    if not 0 < noise_share < math.inf:
        raise ValueError(f"expected a positive share of the noise, got {noise_share}")
    guesses = guesses_for(canaries, epsilon=epsilon, delta=delta)
    right = _accuracy(_distance(epsilon, delta) / noise_share, guesses / canaries)
    # The bound is smooth in the count: so many points, each as often as counts around it.
    levels = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    bounds = [
        lower_bound(
            canaries=canaries,
            guesses=guesses,
            correct=int(count),
            delta=delta,
            confidence=confidence,
        )
        for count in binom.ppf(levels, guesses, right)
    ]
    refuting = (
        count
        for count in range(guesses + 1)
        if p_value(canaries=canaries, guesses=guesses, correct=count, epsilon=epsilon, delta=delta)
        <= 1 - confidence
    )
    return Power(
        canaries=canaries,
        guesses=guesses,
        noise_share=noise_share,
        expected_bound=float(np.mean(bounds)),
        chance=float(binom.sf(next(refuting, guesses + 1) - 1, guesses, right)),
    )


def _distance(epsilon: float, delta: float) -> float:
    """How many deviations of the claimed noise the scores of who is in lie above the others'."""
    one = Sensitivity(l1=1.0, l2=1.0)
    return 1 / calibrate("discrete_gaussian", one, epsilon=epsilon, delta=delta).scale


def _accuracy(distance: float, share: float) -> float:
    """How many are guessed right if that share, the most extreme, is guessed: half of it each way.

    Scores are normal around -distance/2 (out) and distance/2 (in).
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    middle = distance / 2

    def excess(at: float) -> float:
        return float(norm.sf(at - middle) + norm.sf(at + middle) - share)

    at = float(brentq(excess, -1e-9, middle + 40)) if share < 1 else 0.0
    right = float(norm.sf(at - middle))
    return right / (right + float(norm.sf(at + middle)))


def _check(canaries: int, guesses: int, correct: int, delta: float) -> None:
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"expected at most as many correct as guesses and guesses as canaries, got {correct}, "
            f"{guesses}, {canaries}"
        )
    if not 0 <= delta < 1:
        raise ValueError(f"expected δ of at least 0 and below 1, got {delta}")
