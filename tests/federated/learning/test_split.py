"""Held-out people: fixed beforehand, the same in each round, in the share that was announced."""

from __future__ import annotations

from federated.learning.split import is_held_out

TAGS = [f"{number:032x}" for number in range(4000)]


def held(study: str, fraction: float) -> list[bool]:
    return [is_held_out(study=study, tag=tag, fraction=fraction) for tag in TAGS]


def test_the_share_is_what_was_announced() -> None:
    # A binomial of 4000 at 0.2 has a standard deviation of 25.
    assert abs(sum(held("sleep-2026", 0.2)) - 800) < 5 * 25


def test_a_study_holds_out_the_same_people_each_time_and_another_study_others() -> None:
    first = held("sleep-2026", 0.2)
    assert first == held("sleep-2026", 0.2)
    both = sum(a and b for a, b in zip(first, held("sleep-2027", 0.2), strict=True))
    # Independent: 4000 · 0.04, standard deviation 12.4.
    assert abs(both - 160) < 5 * 12.4


def test_a_larger_fraction_holds_out_the_same_people_and_more() -> None:
    small, large = held("s", 0.1), held("s", 0.3)
    assert all(b for a, b in zip(small, large, strict=True) if a)


def test_nobody_at_zero() -> None:
    assert not any(held("s", 0.0))
