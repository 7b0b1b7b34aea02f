"""A claimed cost is never below the truth, matches what others publish, and is refused on doubt."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.accounting import (
    Accountant,
    calibrate,
    compose,
    compose_by_rdp,
    cost_of,
    reference_epsilon,
)
from federated.errors import AccountingError
from federated.model import Mechanism, NoisePlan, PrivacyCost, Sensitivity

ONE = Sensitivity(l1=1, l2=1)

#: Noise multipliers of one full-cohort release of the continuous Gaussian by PLD, δ = 1/(10 N).
PUBLISHED = [
    (300, 2, 1.59), (300, 4, 0.89), (300, 8, 0.51),
    (1000, 2, 1.73), (1000, 4, 0.96), (1000, 8, 0.54),
    (5000, 2, 1.92), (5000, 4, 1.05), (5000, 8, 0.58),
]  # fmt: skip


def laplace(scale: float) -> NoisePlan:
    return NoisePlan(mechanism="discrete_laplace", scale=scale)


def gaussian(scale: float) -> NoisePlan:
    return NoisePlan(mechanism="discrete_gaussian", scale=scale)


def cost(noise: NoisePlan, sensitivity: Sensitivity = ONE, delta: float = 1e-6) -> PrivacyCost:
    return cost_of(noise, sensitivity, delta=delta)


def coordinate(noise: NoisePlan, shift: int) -> dict[float, float]:
    """Privacy loss → probability of one coordinate that a person moves by `shift`."""
    found: dict[float, float] = defaultdict(float)
    if noise.mechanism == "discrete_laplace":
        # Every output below 0 says the same, and so does every one above the shift.
        r = math.exp(-1 / noise.scale)
        for place in range(shift + 1):
            inside = (1 - r) * r**place
            mass = {0: 1.0, shift: r**shift}.get(place, inside) / (1 + r)
            found[round((shift - 2 * place) / noise.scale, 9)] += mass
        return found
    places = range(-15, 16)
    weights = [math.exp(-(place**2) / (2 * noise.scale**2)) for place in places]
    for place, weight in zip(places, weights, strict=True):
        loss = ((place - shift) ** 2 - place**2) / (2 * noise.scale**2)
        found[round(loss, 9)] += weight / sum(weights)
    return found


def losses(noise: NoisePlan, shift: tuple[int, ...]) -> dict[float, float]:
    """Privacy loss → probability, by counting out every output in as many dimensions."""
    return together(*(coordinate(noise, one) for one in shift))


def together(*parts: dict[float, float]) -> dict[float, float]:
    """Loss of independent outputs."""
    found = {0.0: 1.0}
    for part in parts:
        grown: dict[float, float] = defaultdict(float)
        for (a, p), (b, q) in itertools.product(found.items(), part.items()):
            grown[round(a + b, 8)] += p * q
        found = grown
    return found


def true_delta(loss: dict[float, float], epsilon: float) -> float:
    return sum(p * -math.expm1(epsilon - value) for value, p in loss.items() if value > epsilon)


@pytest.mark.parametrize(("people", "epsilon", "multiplier"), PUBLISHED)
def test_the_reference_gives_the_published_noise_multipliers(
    people: int, epsilon: float, multiplier: float
) -> None:
    delta = 1 / (10 * people)
    # Two digits were published: the ε of the printed multiplier lies within their rounding.
    near = reference_epsilon(gaussian(multiplier + 0.005), ONE, delta=delta)
    far = reference_epsilon(gaussian(multiplier - 0.005), ONE, delta=delta)
    assert near <= epsilon <= far


@pytest.mark.parametrize(("people", "epsilon", "multiplier"), PUBLISHED)
def test_what_is_claimed_for_gaussian_noise_is_above_the_reference_and_not_far(
    people: int, epsilon: float, multiplier: float
) -> None:
    delta = 1 / (10 * people)
    claimed = cost(gaussian(multiplier), delta=delta).epsilon
    assert epsilon * 0.98 < reference_epsilon(gaussian(multiplier), ONE, delta=delta) < claimed
    assert claimed < 1.13 * epsilon


def test_renyi_reports_what_was_published_where_pld_gives_two() -> None:
    one = cost(gaussian(1.73), delta=1e-4)
    assert compose_by_rdp([one], delta=1e-4) == pytest.approx(2.21, abs=0.01)
    assert reference_epsilon(one.noise, ONE, delta=1e-4) == pytest.approx(2.0, abs=0.01)


def test_the_scalar_laplace_loss_is_the_one_that_dp_accounting_publishes() -> None:
    # dp_accounting's own test table: parameter 1, sensitivity 2.
    loss = losses(laplace(1), (2,))
    expected = {2.0: 0.73105858, 0.0: 0.17000340, -2.0: 0.09893802}
    assert {k: pytest.approx(v, abs=1e-8) for k, v in expected.items()} == dict(loss)


def test_discrete_laplace_is_pure_and_needs_no_delta() -> None:
    one = cost_of(laplace(4), Sensitivity(l1=2, l2=2), delta=0)
    assert one.epsilon == 0.5
    assert one.delta == 0
    assert compose([one] * 3, delta=0) == pytest.approx(1.5)


@pytest.mark.parametrize("shift", [(1,), (2,), (1, 1), (1, 1, 1), (2, 1)])
@pytest.mark.parametrize("scale", [0.8, 2.0, 3.0])
def test_gaussian_cost_is_never_below_the_truth_in_any_dimension(
    shift: tuple[int, ...], scale: float
) -> None:
    sensitivity = Sensitivity(l1=sum(shift), l2=math.hypot(*shift))
    loss = losses(gaussian(scale), shift)
    for delta in (1e-2, 1e-4):
        claimed = cost_of(gaussian(scale), sensitivity, delta=delta).epsilon
        assert true_delta(loss, claimed) <= delta


@pytest.mark.parametrize("scale", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_gaussian_cost_is_above_the_exact_curve_of_its_authors(scale: float, shift: int) -> None:
    # Canonne, Kamath, Steinke 2020, Theorem 7: the exact δ of one coordinate moved by `shift`.
    reach = int(40 * scale)
    weights = {k: math.exp(-(k**2) / (2 * scale**2)) for k in range(-reach, reach + 1)}
    whole = sum(weights.values())

    def above(limit: float) -> float:
        return sum(weight for k, weight in weights.items() if k > limit) / whole

    sensitivity = Sensitivity(l1=shift, l2=shift)
    theirs = privacy_loss_distribution.from_discrete_gaussian_mechanism(scale, sensitivity=shift)
    for delta in (1e-3, 1e-6):
        epsilon = cost_of(gaussian(scale), sensitivity, delta=delta).epsilon
        middle = epsilon * scale**2 / shift
        exact = above(middle - shift / 2) - math.exp(epsilon) * above(middle + shift / 2)
        assert exact <= delta
        assert theirs.get_epsilon_for_delta(delta) <= epsilon + 1e-4


@settings(deadline=None, max_examples=40)
@given(
    shift=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    scale=st.floats(0.6, 4.0),
    delta=st.sampled_from([1e-1, 1e-2, 1e-4]),
)
def test_laplace_by_pld_is_never_below_the_truth_however_a_person_spreads(
    shift: list[int], scale: float, delta: float
) -> None:
    sensitivity = Sensitivity(l1=sum(shift), l2=math.hypot(*shift))
    loss = losses(laplace(scale), tuple(shift))
    claimed = compose([cost_of(laplace(scale), sensitivity, delta=0)], delta=delta)
    assert true_delta(loss, claimed) <= delta * (1 + 1e-6)


@settings(deadline=None, max_examples=40)
@given(first=st.integers(1, 6), second=st.integers(1, 6), scale=st.floats(0.3, 6.0))
def test_a_move_in_one_coordinate_dominates_the_same_move_in_two(
    first: int, second: int, scale: float
) -> None:
    # The lemma behind the claim (analytics/DESIGN.md), at every ε where the loss has a step.
    one = losses(laplace(scale), (first + second,))
    two = losses(laplace(scale), (first, second))
    for epsilon in sorted(set(one) | set(two)):
        assert true_delta(two, epsilon) <= true_delta(one, epsilon) + 1e-7


@settings(deadline=None, max_examples=15)
@given(
    scales=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=3),
    kinds=st.lists(st.sampled_from(["laplace", "gaussian"]), min_size=3, max_size=3),
)
def test_releases_together_never_cost_less_than_the_truth(
    scales: list[float], kinds: list[str]
) -> None:
    noises = [
        laplace(scale) if kind == "laplace" else gaussian(scale)
        for scale, kind in zip(scales, kinds, strict=False)
    ]
    loss = together(*(coordinate(noise, 1) for noise in noises))
    for delta in (1e-2, 1e-4):
        costs = [cost(noise, delta=delta) for noise in noises]
        claimed = compose(costs, delta=delta)
        assert true_delta(loss, claimed) <= delta * (1 + 1e-6)
        # Losses are rounded up to steps of 1e-4.
        assert compose_by_rdp(costs, delta=delta) >= claimed - 1e-3


def test_pld_of_many_laplace_releases_agrees_with_dp_accounting() -> None:
    theirs = privacy_loss_distribution.from_discrete_laplace_mechanism(0.1).self_compose(40)
    ours = compose([cost(laplace(10))] * 40, delta=1e-6)
    assert ours == pytest.approx(theirs.get_epsilon_for_delta(1e-6))
    assert ours < 40 * 0.1


@settings(deadline=None, max_examples=30)
@given(
    costs=st.lists(
        st.sampled_from([cost(laplace(1)), cost(laplace(5)), cost(gaussian(3)), cost(gaussian(9))]),
        min_size=1,
        max_size=8,
    ),
    random=st.randoms(use_true_random=False),
)
def test_more_releases_never_cost_less_and_order_does_not_matter(
    costs: list[PrivacyCost], random: object
) -> None:
    accountant = Accountant(delta=1e-6)
    assert accountant.compose(costs) == accountant.compose(costs[::-1])
    assert accountant.compose(costs[:-1]) <= accountant.compose(costs) * (1 + 1e-9)


def test_nothing_costs_nothing() -> None:
    assert Accountant(delta=0).compose([]) == 0


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_calibrated_noise_is_the_smallest_that_keeps_to_the_cost(
    mechanism: Mechanism, epsilon: float
) -> None:
    sensitivity = Sensitivity(l1=1178, l2=1035.5)
    plan = calibrate(mechanism, sensitivity, epsilon=epsilon, delta=1e-6)
    less = NoisePlan(mechanism=mechanism, scale=plan.scale * (1 - 1e-6))
    assert cost_of(plan, sensitivity, delta=1e-6).epsilon <= epsilon
    assert cost_of(less, sensitivity, delta=1e-6).epsilon > epsilon


def test_adaptive_costs_are_added_up_and_their_delta_too() -> None:
    accountant = Accountant(delta=1e-6, adaptive=True)
    assert accountant.compose([cost(laplace(2))] * 20) == pytest.approx(10)
    with pytest.raises(AccountingError, match="add up"):
        accountant.compose([cost(gaussian(4), delta=6e-7)] * 2)


def test_noise_that_is_not_quite_as_planned_takes_delta() -> None:
    plain = cost_of(gaussian(4), ONE, delta=1e-6)
    shares = cost_of(gaussian(4), ONE, delta=1e-6, closeness=1e-8)
    assert shares.epsilon > plain.epsilon
    assert compose([shares], delta=1e-6) == pytest.approx(shares.epsilon)
    assert compose([shares] * 2, delta=1e-6) > compose([plain] * 2, delta=1e-6)
    wrapped = cost_of(laplace(1), ONE, delta=1e-6, closeness=1e-9)
    assert wrapped.epsilon == 1
    assert wrapped.delta == pytest.approx((1 + math.e) * 1e-9)


def test_closeness_that_takes_all_of_delta_is_an_unbounded_cost() -> None:
    for noise in (laplace(1), gaussian(4)):
        with pytest.raises(AccountingError):
            cost_of(noise, ONE, delta=1e-6, closeness=1e-6)
    close = PrivacyCost(epsilon=1, delta=1e-6, noise=laplace(1), sensitivity=ONE, closeness=1e-7)
    with pytest.raises(AccountingError, match="not bounded"):
        compose([close] * 20, delta=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_an_unknown_cost_is_refused_and_never_small(scale: float) -> None:
    broken = PrivacyCost(epsilon=0, delta=0, noise=laplace(scale), sensitivity=ONE)
    for act in (
        lambda: cost_of(laplace(scale), ONE, delta=1e-6),
        lambda: cost_of(gaussian(scale), ONE, delta=1e-6),
        lambda: compose([broken], delta=1e-6),
        lambda: Accountant(delta=1e-6, adaptive=True).compose([broken]),
    ):
        with pytest.raises(AccountingError):
            act()


@pytest.mark.parametrize(
    "sensitivity",
    [
        Sensitivity(l1=0, l2=0),
        Sensitivity(l1=math.nan, l2=1),
        Sensitivity(l1=math.inf, l2=1),
        Sensitivity(l1=1, l2=2),
    ],
)
def test_a_sensitivity_that_cannot_be_is_refused(sensitivity: Sensitivity) -> None:
    with pytest.raises(AccountingError):
        cost_of(laplace(1), sensitivity, delta=1e-6)
    with pytest.raises(AccountingError):
        calibrate("discrete_laplace", sensitivity, epsilon=1)


def test_what_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(AccountingError, match="δ above 0"):
        calibrate("discrete_gaussian", ONE, epsilon=1, delta=0)
    with pytest.raises(AccountingError):
        compose([cost(gaussian(3))], delta=0)
    with pytest.raises(AccountingError):
        calibrate("discrete_laplace", ONE, epsilon=0)
    with pytest.raises(AccountingError):
        Accountant(delta=1.0)
    unknown = NoisePlan(mechanism="rounded_normal", scale=1)  # type: ignore[arg-type]
    with pytest.raises(AccountingError, match="no mechanism"):
        cost_of(unknown, ONE, delta=1e-6)
    with pytest.raises(AccountingError, match="no mechanism"):
        calibrate("rounded_normal", ONE, epsilon=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("closeness", [2.0485244488716122e-07, 2.048524746596813e-07])
def test_refuses_when_what_closeness_takes_cannot_be_settled(closeness: float) -> None:
    # A hair below, and above, the closeness from which on no ε is enough: each ε takes so much of δ
    # that a larger one is due, by steps that hardly shrink.
    with pytest.raises(AccountingError, match="not settled"):
        cost_of(gaussian(4), ONE, delta=1e-6, closeness=closeness)
    one = cost(gaussian(4))
    close = PrivacyCost(
        epsilon=one.epsilon, delta=1e-6, noise=one.noise, sensitivity=ONE, closeness=closeness
    )
    with pytest.raises(AccountingError, match="not settled"):
        compose([close], delta=1e-6)


@settings(deadline=None, max_examples=60)
@given(scale=st.floats(1.0, 20.0), share=st.floats(0.0, 0.3))
def test_a_cost_holds_at_what_closeness_leaves_of_delta(scale: float, share: float) -> None:
    delta = 1e-5
    try:
        found = cost_of(gaussian(scale), ONE, delta=delta, closeness=share * delta)
    except AccountingError:
        return
    left = delta - (1 + math.exp(found.epsilon)) * share * delta
    assert left > 0
    assert cost_of(gaussian(scale), ONE, delta=left).epsilon <= found.epsilon
