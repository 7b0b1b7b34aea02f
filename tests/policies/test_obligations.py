"""Obligations add up; the strictest bound wins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.obligations import (
    ALL,
    LimitRows,
    Obligation,
    Redact,
    RedisclosureNotice,
    StepUp,
    in_words,
    join,
    parse_obligations,
)

obligations = st.one_of(
    st.frozensets(st.sampled_from(["A.a", "A.b", "B.c"]), min_size=1).map(
        lambda fields: Redact(fields=fields)
    ),
    st.integers(1, 9).map(lambda rows: LimitRows(rows=rows)),
    st.integers(1, 9).map(lambda age: StepUp(max_age_s=age)),
    st.sampled_from(["a", "b"]).map(lambda notice: RedisclosureNotice(notice=notice)),
)


@given(st.lists(obligations), st.lists(obligations))
def test_joining_loses_nothing_and_does_not_depend_on_order(
    one: list[Obligation], other: list[Obligation]
) -> None:
    joined = join([*one, *other])
    assert joined == join([*other, *one]) == join([*join(one), *join(other)])
    for obligation in [*one, *other]:
        assert join([*joined, obligation]) == joined


def test_every_kind_can_be_written_and_said() -> None:
    written = {
        "obligation_redact": "A.b, C.d.e",
        "obligation_mask": "A.b",
        "obligation_pseudonymise": "A.b",
        "obligation_step_up": "60",
        "obligation_limit_rows": "5",
        "obligation_notice": "42CFR2.32",
        "obligation_exclude_from_counts": "PSYTHPN",
        "obligation_review": "86400",
        "title": "x",
    }
    parsed = parse_obligations(written)
    assert {type(one) for one in parsed} == ALL
    assert all(in_words(one) for one in parsed)
