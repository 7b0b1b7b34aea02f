"""Messages are parsed strictly, are of one round, and have the sizes that are said."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregation.messages import (
    Adverts,
    Begin,
    Consent,
    Consents,
    Delivered,
    Masked,
    Reveal,
    Shares,
    Survivors,
    adverts_digest,
    consent_text,
    encode,
    largest_message,
    parse,
    unique,
)
from federated.aggregation.server import Stage
from federated.errors import ProtocolError
from tests.federated.aggregation.rounds import STAGES, Cohort, make_plan, noise

PLAN = make_plan()
KINDS = (Begin, Adverts, Shares, Delivered, Masked, Survivors, Consent, Consents, Reveal)


@given(junk=st.binary(max_size=300), kind=st.sampled_from(KINDS))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_junk_is_refused_and_nothing_else_is_raised(junk: bytes, kind: type[Begin]) -> None:
    with pytest.raises(ProtocolError):
        parse(kind, junk, PLAN)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(values=st.lists(_VALUES, max_size=5), kind=st.sampled_from(KINDS))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_wrong_types_are_refused(values: list[object], kind: type[Begin]) -> None:
    tag = kind.__name__.lower()
    with pytest.raises(ProtocolError):
        parse(kind, msgspec.msgpack.encode([tag, b"x" * 32, *values]), PLAN)


def test_a_message_of_another_plan_is_refused() -> None:
    with pytest.raises(ProtocolError, match="another round"):
        parse(Begin, encode(Begin(make_plan(study="other").digest)), PLAN)


def test_secrets_of_the_wrong_length_are_refused() -> None:
    plan = PLAN.digest
    for reveal in (
        Reveal(plan, "node-0", b"short", (), (), ()),
        Reveal(plan, "node-0", b"x" * 32, (b"long" * 20,), (), ()),
    ):
        with pytest.raises(ProtocolError):
            parse(Reveal, encode(reveal), PLAN)


def test_no_honest_message_is_too_long_and_larger_ones_are_refused() -> None:
    plan = make_plan(9, noise=noise(), modulus_bits=64, dimension=100)
    cohort = Cohort(plan)
    for stage in STAGES:
        requests = cohort.until(stage)
        replies = cohort.answers(requests)
        for data in (*requests.values(), *replies.values()):
            assert len(data) <= largest_message(plan)
        cohort.server.collect(replies)
    assert cohort.server.stage is Stage.DONE
    with pytest.raises(ProtocolError, match="longer than any"):
        parse(Begin, bytes(largest_message(plan) + 1), plan)


def test_what_is_signed_differs_with_everything_that_was_told() -> None:
    everyone = frozenset(PLAN.nodes)
    texts = {
        consent_text(plan, adverts=adverts, shared=shared, survivors=survivors)
        for plan in (PLAN, make_plan(round_id="2"))
        for adverts in (b"a" * 32, b"b" * 32)
        for shared in (everyone, everyone - {"node-5"})
        for survivors in (everyone - {"node-5"}, everyone - {"node-5", "node-4"})
    }
    assert len(texts) == 16


def test_the_hash_over_adverts_does_not_depend_on_their_order() -> None:
    adverts = parse(Adverts, Cohort(PLAN).until(Stage.SHARE)["node-0"], PLAN).adverts
    assert adverts_digest(adverts) == adverts_digest(adverts[::-1])
    assert adverts_digest(adverts) != adverts_digest(adverts[1:])


def test_double_ids_are_refused() -> None:
    assert unique(["a", "b"], "nodes") == {"a", "b"}
    with pytest.raises(ProtocolError, match="twice among nodes"):
        unique(["a", "b", "a"], "nodes")
