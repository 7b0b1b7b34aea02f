"""A bundle loads whole or not at all, and says where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies import bundle
from policies.bundle import load, parse_bundle
from policies.errors import BundleError, PolicyConfigurationError
from policies.source import statements

SCHEMA = bundle.SCHEMA_FILE.read_text()
GOOD = '@id("own.rule") @title("t") @cites("c")\npermit(principal, action, resource);'
FORBID = (
    '@id("own.no") @title("t") @cites("c") @reason("r") @remedy("consent")\n'
    "forbid(principal, action, resource);"
)


def test_line_numbers_survive_comments_and_strings() -> None:
    text = (
        '// a; comment\n\n@title("; not; the // end \\" ;")\n'
        "permit(principal,\naction,resource);\n// ;\n\nx;"
    )
    assert [one.line for one in statements(text)] == [3, 8]


def test_a_statement_without_an_end_is_not_overlooked() -> None:
    with pytest.raises(BundleError, match=r"a\.cedar:3: is not Cedar"):
        parse_bundle([("a.cedar", GOOD + "\nforbid(principal, action, resource)")], schema=SCHEMA)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD.replace("permit", "pemit"), "is not Cedar"),
        (GOOD.replace('@id("own.rule")', ""), "needs @id"),
        (GOOD.replace('@title("t")', ""), "needs @title"),
        (GOOD.replace('@cites("c")', '@cites("")'), "needs @cites"),
        (GOOD.replace("own.rule", "own rule"), "@id must be"),
        (GOOD.replace("own.rule", "eyJhbGciOi"), "@id must be"),
        (GOOD.replace("@cites", "@obligaton_redact"), "Did you mean “@obligation_redact”"),
        (GOOD.replace("@cites", '@obligation_erase("x") @cites'), "unknown obligation"),
        (GOOD.replace("@cites", '@obligation_redact("x") @cites'), "expected Type.element"),
        (GOOD.replace("@cites", '@obligation_step_up("-1") @cites'), "whole number"),
        (GOOD.replace("@cites", "@obligation_limit_rows @cites"), "whole number"),
        (GOOD.replace("@cites", '@obligation_exclude_from_counts("PSYTPN") @cites'), "labels are"),
        (GOOD.replace("@cites", '@grants("everything") @cites'), "@grants"),
        (GOOD.replace("principal,", 'principal in Role::"clinican",'), "did you mean “clinician”"),
        (GOOD.replace("resource)", 'resource in Label::"PSYTPN")'), "does not fit the schema"),
        (GOOD.replace(";", ' when { principal.purpose == Purpose::"TRET" };'), "does not fit"),
        (GOOD.replace(";", " when { context.secondFactorAgeSeconds > 3 };"), "does not fit"),
        (GOOD.replace(";", " when { context.nothing };"), "does not fit"),
        (GOOD.replace("principal,", "principal == ?principal,"), "without slots"),
        (FORBID.replace('@reason("r")', ""), "needs @reason"),
        (FORBID.replace("consent", "pray"), "@remedy must be"),
        (FORBID.replace("@cites", '@obligation_review("5") @cites'), "no obligations"),
        (FORBID.replace("@cites", '@grants("nothing") @cites'), "@grants"),
    ],
)
def test_a_rule_that_is_not_right_is_refused_with_file_and_line(text: str, problem: str) -> None:
    with pytest.raises(BundleError, match=problem) as caught:
        parse_bundle(
            [("first.cedar", FORBID.replace("own.no", "x")), ("own.cedar", f"\n\n{text}")],
            schema=SCHEMA,
        )
    assert str(caught.value).startswith("own.cedar:3: ")
    assert caught.value.where == "own.cedar:3"


def test_an_id_is_given_once_in_all_files() -> None:
    with pytest.raises(BundleError, match=r"taken by a\.cedar:1"):
        parse_bundle([("a.cedar", GOOD), ("b.cedar", GOOD)], schema=SCHEMA)


def test_no_rules_are_no_bundle() -> None:
    with pytest.raises(BundleError, match="found 0"):
        parse_bundle([("a.cedar", "// nothing")], schema=SCHEMA)


def test_a_broken_schema_is_refused() -> None:
    with pytest.raises(BundleError, match="not a Cedar schema"):
        parse_bundle([("a.cedar", GOOD)], schema="entity")


def test_a_clinics_rules_are_loaded_beside_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "own.cedar").write_text(FORBID.replace("principal,", 'principal in Role::"chef",'))
    with pytest.raises(BundleError, match=r"policies\.roles"):
        load([tmp_path])
    found = load([tmp_path], roles=["chef"])
    assert len(found.rules) == len(load().rules) + 1
    assert found.rules[-1].where == f"{tmp_path}/own.cedar:1"


def test_a_clinic_cannot_replace_a_built_in_rule(tmp_path: Path) -> None:
    (tmp_path / "own.cedar").write_text(GOOD.replace("own.rule", "part2.consent"))
    with pytest.raises(BundleError, match="is taken by"):
        load([tmp_path])


def test_any_change_changes_the_hash(tmp_path: Path) -> None:
    own = tmp_path / "own.cedar"
    hashes = {load().hash}
    for text in (GOOD, GOOD + "\n", GOOD.replace('"c"', '"d"')):
        own.write_text(text)
        hashes.add(load([tmp_path]).hash)
    assert len(hashes) == 4
    assert load([tmp_path]).hash in hashes


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyConfigurationError, match="nowhere"):
        load([tmp_path / "nowhere"])
    (tmp_path / "own.cedar").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="UTF-8"):
        load([tmp_path])
    (tmp_path / "own.cedar").write_bytes(b" " * (bundle.MAX_FILE_BYTES + 1))
    with pytest.raises(BundleError, match="larger than"):
        load([tmp_path])


@pytest.mark.parametrize("ends", ["\r", "\n", "\r\n"])
def test_no_line_break_hides_a_rule_behind_a_comment(ends: str) -> None:
    """Cedar ends a comment at a carriage return, too: what follows is a rule."""
    found = parse_bundle([("a.cedar", f"// closed{ends}{FORBID}{ends}{GOOD}")], schema=SCHEMA)
    assert [rule.effect for rule in found.rules] == ["forbid", "permit"]


@pytest.mark.parametrize(
    "condition",
    [
        "(" * 17 + "true" + ")" * 17,
        "[" * 5_000 + "]" * 5_000 + " == 1",
        " && ".join(["true"] * 100),
        "if true then true else " * 700 + "true",
        "1" + " - 1" * 20_000 + " == 1",
    ],
    ids=["brackets", "lists", "and", "if", "long"],
)
def test_a_rule_too_deep_for_the_parser_is_refused_before_it_ends_the_process(
    condition: str,
) -> None:
    text = GOOD.replace(";", f" when {{ {condition} }};")
    with pytest.raises(BundleError, match="in two"):
        parse_bundle([("a.cedar", text)], schema=SCHEMA)
