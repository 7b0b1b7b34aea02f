"""A study says what it must, has one form of bytes, and is signed by everybody it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.code_hash import installed_code_hash
from federated.draft import Planned, encode_toml, parse_draft, parse_study
from federated.errors import ApprovalError, ManifestError
from federated.manifest import canonical_json, parse_canonical, parse_manifest, roster_hash
from federated.model import NoisePlan
from federated.signed_study import (
    MAX_SIGNED_BYTES,
    SignedStudy,
    StudySignature,
    TrustedKeys,
    parse_signed_study,
    sign_study,
    signing_message,
    verify_study,
)
from tests.federated.studies import STUDY_TOML, MemorySigner, Parties, study


def test_canonical_bytes_read_back_as_the_same_study() -> None:
    one = study()
    assert parse_manifest(one.canonical_bytes()) == one
    assert parse_manifest(one.canonical_bytes()).study_hash == one.study_hash


def test_a_study_written_as_toml_is_the_same_study() -> None:
    one = study({'title = "Sleep and mood"': r'title = "Sleep \"and\" möd"'})
    assert parse_study(encode_toml(one).encode()) == one


def test_the_order_of_keys_in_the_file_changes_nothing() -> None:
    moved = STUDY_TOML.replace('purpose = "HRESCH"\n', "")
    moved = moved.replace("epsilon = 1.0\n", 'epsilon = 1.0\npurpose = "HRESCH"\n', 1)
    assert parse_study(moved.encode()).study_hash == study().study_hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('title = "Sleep and mood"', 'title = "Sleep and Mood"'),
        ("rounds-timeout = 30", "rounds-timeout = 31"),
        ("minimum_cohort = 10", "minimum_cohort = 11"),
        ("scale = 12.5", "scale = 12.4"),
        ("high = 12.0", "high = 12"),
        ('["north", "south"]', '["north"]'),
        ("colluding = 1", "colluding = 2"),
        ("cd" * 32, "ce" * 32),
        ("ab" * 32, "ac" * 32),
        ("1800990000", "1800990001"),
    ],
)
def test_every_change_changes_the_hash(old: str, new: str) -> None:
    assert study({old: new}).study_hash != study().study_hash


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("minimum_cohort", "minimum_cohorts", "Did you mean “minimum_cohort”"),
        ("threshold", "treshold", "aggregation.treshold”. Did you mean “threshold”"),
        ("mechanism =", "mechanisms =", "Did you mean “mechanism”"),
        ("delta = 1e-6", "delta = 0.1", "below 1/minimum_cohort"),
        ("epsilon = 1.0", "epsilon = 0.4", "dearest"),
        ("epsilon = 1.0", "epsilon = 1.2", "dearest"),
        ("epsilon = 1.0", "epsilon = nan", "`epsilon` must be above 0"),
        ("epsilon = 0.5", "epsilon = inf", "dearest"),
        ("epsilon = 1.0", "epsilon = 17.0", "at most 16"),
        ("minimum_cohort = 10", "minimum_cohort = 1", "from 2 to"),
        ("1800990000", "1899990000", "a year at most"),
        ('"HRESCH"', '"research"', "PurposeOfUse"),
        ('id = "sleep-and-mood"', 'id = "Sleep and mood"', "`id` must be"),
        ('title = "Sleep and mood"', 'title = ""', "`title` must be"),
        ('title = "Sleep and mood"', r'title = "a\u0007b"', "printable"),
        ('name = "mood"', 'name = "sleep"', "same name"),
        ("scale = 12.5", "scale = 0.0", "`scale`"),
        ("scale = 12.5", "scale = inf", "`scale`"),
        ("delta = 5e-7", "delta = 0.0", "needs a `delta`"),
        ("discrete_gaussian", "gaussian", "`mechanism`"),
        ("colluding = 1", "colluding = 3", "aggregation.colluding"),
        ("colluding = 1", "colluding = 0", "at least 1: each node knows the noise"),
        ("rounds-timeout", "study-hash", "not name the study itself"),
        ("rounds-timeout = 30", "rounds-timeout = inf", "run_config.rounds-timeout"),
        ("ab" * 32, "xy" * 32, "SHA-256"),
        ('columns = ["sleep_hours"]', 'columns = ["Sleep hours"]', "names of a-z"),
        ("high = 12.0", "high = nan", "finite numbers"),
        ("high = 12.0", "high = 2026-01-01", "finite numbers"),
        ("valid_from = 1799990000", "valid_from = 2026-11-28T00:00:00", "needs an offset"),
    ],
)
def test_refuses_what_is_wrong_and_says_what(old: str, new: str, says: str) -> None:
    assert old in STUDY_TOML
    with pytest.raises(ManifestError, match=says.replace("“", ".").replace("”", ".")):
        study({old: new})


def test_refuses_what_is_too_large_or_no_toml() -> None:
    for data in (b"x" * 70_000, b"\xff", b"a = [", b"= 1"):
        with pytest.raises(ManifestError):
            parse_draft(data)


def test_a_gap_is_filled_by_the_plan_and_what_is_said_is_kept() -> None:
    short = STUDY_TOML.replace('mechanism = "discrete_gaussian"\nscale = 12.5\n', "", 1)
    short = short.replace('columns = ["sleep_hours"]\n', "", 1)
    with pytest.raises(ManifestError, match="which `columns`"):
        parse_study(short.encode())
    nameless = STUDY_TOML.replace(f'code_hash = "{"cd" * 32}"\n', "")
    with pytest.raises(ManifestError, match="`code_hash`"):
        parse_study(nameless.encode())
    short = short.replace(f'code_hash = "{"cd" * 32}"\n', "")
    noise = NoisePlan(mechanism="discrete_gaussian", scale=12.5)
    plan = {
        "sleep": Planned(columns=frozenset({"sleep_hours"}), noise=noise),
        "mood": Planned(columns=frozenset({"other"}), noise=replace(noise, scale=99.0)),
    }
    whole = parse_draft(short.encode()).complete(planned=plan, code_hash="cd" * 32, roster="0" * 64)
    assert whole == study()


def test_dates_are_days_of_utc() -> None:
    dated = study({"valid_from = 1799990000": "valid_from = 2027-01-01"})
    assert dated.valid_from % 86_400 == 0
    assert study({"valid_from = 1799990000": "valid_from = 2027-01-01T00:00:00Z"}) == dated


def test_refuses_bytes_that_are_not_the_canonical_ones() -> None:
    raw = study().canonical_bytes()
    for changed in (
        raw.replace(b'"rounds":2', b'"rounds": 2'),
        raw.replace(b'"delta":1e-06', b'"delta":0.000001'),
        raw.replace(b'"epsilon":1.0', b'"epsilon":1'),
        raw.replace(b'"version":1', b'"version":2'),
        raw.replace(b'"rounds":2,', b'"rounds":2,"rounds":2,'),
        raw.replace(b'"rounds":2,', b'"rouds":2,'),
        raw + b"\n",
        raw[:-1],
        b"[" * 10_000,
        b"",
    ):
        assert changed != raw
        with pytest.raises(ManifestError):
            parse_manifest(changed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_canonical_json_has_one_form(value: object) -> None:
    try:
        raw = canonical_json(value)
    except ManifestError:
        return
    assert canonical_json(json.loads(raw)) == raw
    assert parse_canonical(raw, what="It") == json.loads(raw)


def test_what_reaches_flower_is_the_run_configuration_and_the_study() -> None:
    one = study()
    assert one.run_configuration() == {
        "rounds-timeout": 30,
        "study-id": "sleep-and-mood",
        "study-hash": one.study_hash,
    }


def test_a_checked_study_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        study().run_config["rounds-timeout"] = 5  # type: ignore[index]


def test_the_roster_counts_ids_and_keys() -> None:
    nodes = {"a": b"1" * 32, "b": b"2" * 32}
    assert roster_hash(nodes) == roster_hash(dict(reversed(nodes.items())))
    assert roster_hash(nodes) != roster_hash({"a": b"2" * 32, "b": b"1" * 32})
    assert roster_hash(nodes) != roster_hash({"a": b"1" * 32})


def test_the_code_hash_sees_every_source_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    seen = set()
    for name, content in (
        ("a.py", "x = 1\n"),
        ("a.py", "x = 2\n"),
        ("sub/b.py", ""),
        ("sub/c.toml", "a = 1\n"),
        ("sub/b.py", "y = 1\n"),
    ):
        (tmp_path / name).write_text(content)
        installed_code_hash.cache_clear()
        seen.add(installed_code_hash(tmp_path))
    assert len(seen) == 5
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"cache")
    installed_code_hash.cache_clear()
    assert installed_code_hash(tmp_path) in seen


@pytest.fixture(scope="module")
def parties() -> Parties:
    return Parties()


def test_a_study_with_every_signature_is_verified(parties: Parties) -> None:
    signed = parse_signed_study(parties.sign(study()).encode())
    assert signed == parties.sign(study())
    verify_study(signed, parties.trusted)
    verify_study(signed, replace(parties.trusted, own_site="north"))


@pytest.mark.parametrize("missing", range(4))
def test_refuses_a_study_without_any_one_of_its_signatures(parties: Parties, missing: int) -> None:
    signed = parties.sign(study())
    fewer = tuple(s for at, s in enumerate(signed.signatures) if at != missing)
    with pytest.raises(ApprovalError, match="Ask for the missing approval"):
        verify_study(replace(signed, signatures=fewer), parties.trusted)


def test_refuses_signatures_of_another_study(parties: Parties) -> None:
    signed = parties.sign(study())
    other = study({"minimum_cohort = 10": "minimum_cohort = 5"})
    with pytest.raises(ApprovalError, match="does not fit"):
        verify_study(replace(signed, study=other), parties.trusted)


def test_refuses_a_signature_moved_to_another_role_or_site(parties: Parties) -> None:
    one = study()
    board = sign_study(one, parties.board, role="ethics-board")
    north = sign_study(one, parties.sites["north"], role="site", site="north")
    for moved in (replace(board, role="coordinator"), replace(north, site="south")):
        with pytest.raises(ApprovalError, match="does not fit"):
            verify_study(SignedStudy(study=one, signatures=(moved,)), parties.trusted)


def test_a_key_that_is_unknown_here_counts_for_nothing(parties: Parties) -> None:
    signed = parties.sign(study())
    with pytest.raises(ApprovalError, match="has 0"):
        verify_study(signed, Parties().trusted)
    stranger = sign_study(study(), MemorySigner(), role="ethics-board")
    verify_study(replace(signed, signatures=(*signed.signatures, stranger)), parties.trusted)


def test_nobody_speaks_in_two_roles(parties: Parties) -> None:
    one = study({'["north", "south"]': '["north"]'})
    both = MemorySigner()
    trusted = TrustedKeys(
        coordinator=frozenset({parties.coordinator.public}),
        ethics_board=frozenset({both.public}),
        sites={"north": frozenset({both.public})},
    )
    signed = SignedStudy(
        study=one,
        signatures=(
            sign_study(one, parties.coordinator, role="coordinator"),
            sign_study(one, both, role="ethics-board"),
            sign_study(one, both, role="site", site="north"),
        ),
    )
    with pytest.raises(ApprovalError, match="two roles"):
        verify_study(signed, trusted)


def test_the_same_member_twice_is_one_member(parties: Parties) -> None:
    one = study({"minimum_cohort": "ethics_approvals = 2\nminimum_cohort"})
    signed = parties.sign(one)
    twice = replace(signed, signatures=signed.signatures * 2)
    with pytest.raises(ApprovalError, match="needs 2 known"):
        verify_study(twice, parties.trusted)


def test_a_site_that_is_not_asked_does_not_run_it(parties: Parties) -> None:
    signed = parties.sign(study())
    with pytest.raises(ApprovalError, match="does not ask the site west"):
        verify_study(signed, replace(parties.trusted, own_site="west"))


def test_a_study_always_needs_the_ethics_board() -> None:
    with pytest.raises(ManifestError, match="ethics_approvals"):
        study({"minimum_cohort": "ethics_approvals = 0\nminimum_cohort"})


def test_messages_of_different_places_never_meet() -> None:
    places = {
        signing_message("0" * 64, role="site", site="north"),
        signing_message("0" * 64, role="site", site="south"),
        signing_message("0" * 64, role="ethics-board"),
        signing_message("0" * 64, role="coordinator"),
    }
    assert len(places) == 4
    assert all(one.startswith(b"havengate/study/v1\n") for one in places)


def test_refuses_signed_studies_that_are_malformed(parties: Parties) -> None:
    signed = parties.sign(study())
    short = replace(signed.signatures[0], signature=b"short")
    nowhere = StudySignature(role="site", public_key=b"k" * 32, signature=b"s" * 64)
    for bad in (
        b"{}",
        b"[" * 9000,
        b" " * (MAX_SIGNED_BYTES + 1),
        b'{"manifest":"\xff\xfe","signatures":[]}',
        b'{"\xff":1}',
        b'{"manifest":"\\ud800","signatures":[]}',
        replace(signed, signatures=signed.signatures * 100).encode(),
        replace(signed, signatures=(short,)).encode(),
        replace(signed, signatures=(nowhere,)).encode(),
        signed.encode().replace(b'"coordinator"', b'"chief"'),
    ):
        with pytest.raises(ManifestError):
            parse_signed_study(bad)
