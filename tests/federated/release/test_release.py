"""What is given out says everything, says the same to people and programs, and can be checked."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from audit.proof import parse_proof
from federated.errors import ApprovalError, ManifestError, StudyLogError
from federated.manifest import Study
from federated.release.check import verify_document
from federated.release.document import document_hash, encode_document, parse_document
from federated.release.plots import plot_estimates
from federated.release.report import make_report
from federated.signed_study import parse_signed_study, sign_study
from tests.federated.release.documents import Believed, make, make_believed
from tests.federated.studies import ORIGIN, MemorySigner


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make(tmp_path_factory.mktemp("release"), failures={})


class Page(HTMLParser):
    """Collects what a page would load or run, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action", "data", "srcset"}:
                self.links.append(value or "")
            assert not name.startswith("on")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_document_says_all_that_a_release_must(document: dict[str, Any]) -> None:
    assert document["study"]["question"].startswith("How does mood")
    assert document["privacy"]["unit"] == "person"
    assert document["privacy"]["adjacency"] == "zero-out"
    assert 0.5 < document["privacy"]["epsilon"] < 1
    assert document["privacy"]["delta"] == 1e-6
    assert [one["round"] for one in document["privacy"]["charged"]] == ["7-0", "7-1"]
    assert document["trust"] == {
        "model": "secure_aggregation",
        "threshold": 3,
        "colluding": 1,
        "minimum_survivors": 3,
    }
    first = document["answers"][0]
    assert (first["people"], first["nodes"]) == (5068, 4)
    assert first["cost"]["mechanism"] == "discrete_gaussian"
    assert first["estimates"][0]["low"] < first["estimates"][0]["value"]
    assert first["estimates"][0]["level"] == 0.95
    steps = [(one["step"], one["role"], one["site"]) for one in document["approvals"]]
    assert steps == [
        ("propose", "researcher", ""),
        ("approve", "ethics-board", ""),
        ("approve", "site", "north"),
        ("approve", "site", "south"),
        ("publish", "coordinator", ""),
    ]


def test_the_document_carries_evidence_that_can_be_checked(document: dict[str, Any]) -> None:
    evidence = document["evidence"]
    signed = parse_signed_study(evidence["signed_study"].encode())
    assert signed.study.study_hash == document["study"]["hash"]
    proof = parse_proof(base64.b64decode(evidence["log_proof"]))
    assert proof.extra is not None
    assert document["study"]["hash"].encode() in proof.extra


def test_nobody_is_named(document: dict[str, Any]) -> None:
    text = encode_document(document).decode()
    for name in ("ruth", "emil", "nora", "sven"):
        assert name not in text


def test_the_document_reads_back_with_the_same_hash(document: dict[str, Any]) -> None:
    again = parse_document(encode_document(document))
    assert again == document
    assert document_hash(again) == document_hash(document)
    changed = json.loads(encode_document(document))
    changed["answers"][0]["estimates"][0]["value"] += 1e-9
    assert document_hash(changed) != document_hash(document)


def test_refuses_what_is_no_document() -> None:
    for data in (b"", b"[]", b"{}", b'{"format":"other"}'):
        with pytest.raises(ManifestError):
            parse_document(data)


def test_the_report_says_what_the_document_says(document: dict[str, Any]) -> None:
    text = make_report(document, answer_hash="ab" * 32, released=17)
    words = " ".join(" ".join(Page(text).words).split())
    for expected in (
        document["study"]["question"],
        "5,068",
        f"ε = {document['privacy']['epsilon']:.4g}",
        "1.0e\N{MINUS SIGN}6",
        "zero-out",
        "secure aggregation",
        "nobody, the coordinator included",
        "knowing the noise that they added themselves, are at most 1 in number",
        "Discrete Gaussian noise of scale 9,400",
        "4.99 to 5.83",
        "95 % interval",
        "which can pull means inward",
        "ethics-board",
        "site north",
        "entry 17",
        "ab" * 32,
        document["study"]["hash"],
        "c2sp.org/tlog-proof@v1",
    ):
        assert expected in words, expected
    assert text.count("<svg") == 2


def test_the_report_loads_and_runs_nothing(document: dict[str, Any]) -> None:
    text = make_report(document, answer_hash="ab" * 32, released=None)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "<!DOCTYPE svg" not in text
    assert "<metadata>" not in text


def test_nothing_from_a_study_becomes_markup(document: dict[str, Any]) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;$x^2$'
    hostile = json.loads(encode_document(document))
    hostile["study"]["title"] = hostile["study"]["question"] = evil
    hostile["failures"] = {evil: evil}
    for answer in hostile["answers"]:
        answer["query"] = evil
        answer["cautions"] = [evil]
        for one in answer["estimates"]:
            one["name"] = one["unit"] = evil
    for step in hostile["approvals"]:
        step["role"] = step["site"] = evil
    page = Page(make_report(hostile, answer_hash=evil, released=None))
    assert not {"script", "img"} & set(page.tags)


def test_a_plot_is_the_same_each_time_and_shows_every_estimate(document: dict[str, Any]) -> None:
    estimates = document["answers"][0]["estimates"]
    svg = plot_estimates(estimates, label="sleep")
    assert svg == plot_estimates(estimates, label="sleep")
    for one in estimates:
        assert one["name"] in svg
    assert svg.startswith("<svg ")


def test_an_answer_with_one_flat_or_many_estimates_is_drawn() -> None:
    one = {"name": "n", "value": 1.0, "low": 1.0, "high": 1.0, "level": 0.95, "unit": ""}
    for many in (1, 2, 30, 31, 500):
        assert "<svg" in plot_estimates([{**one, "name": f"n{n}"} for n in range(many)], label="x")


# Checking with public keys alone


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Believed]:
    return make_believed(tmp_path_factory.mktemp("checked"))


def check(document: dict[str, Any], believed: Believed, **changes: Any) -> Study:
    values = {
        "trusted": believed.trusted,
        "origin": ORIGIN,
        "log_keys": believed.log_keys,
        "witness_keys": believed.witness_keys,
        **changes,
    }
    return verify_document(document, values.pop("trusted"), **values)


def test_a_release_is_proven_with_public_keys(released: tuple[dict[str, Any], Believed]) -> None:
    document, believed = released
    assert check(document, believed).study_hash == document["study"]["hash"]


def test_a_release_is_not_proven_by_other_keys(released: tuple[dict[str, Any], Believed]) -> None:
    document, believed = released
    with pytest.raises(ApprovalError):
        check(document, believed, trusted=replace(believed.trusted, ethics_board=frozenset()))
    for other in ({"log_keys": ()}, {"witness_keys": ()}, {"origin": "log.example/other"}):
        with pytest.raises(StudyLogError):
            check(document, believed, **other)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["study", "question"], "Another?"),
        (["study", "minimum_cohort"], 5),
        (["trust", "model"], "trusted_server"),
        (["trust", "colluding"], 2),
        (["privacy", "epsilon"], 1.5),
        (["privacy", "delta"], 1e-3),
        (["privacy", "approved_epsilon"], 2.0),
        (["privacy", "unit"], "event"),
        (["answers", 0, "people"], 999),
        (["answers", 0, "query"], "mood"),
        (["answers", 0, "ask", "high"], 13.0),
        (["answers", 0, "cost", "scale"], 9000.0),
        (["evidence", "log_proof"], "!"),
        (["evidence", "signed_study"], 7),
        (["evidence"], {}),
        (["answers"], [{}]),
        (["privacy", "charged"], []),
        (["privacy", "charged", 0, "cost", "epsilon"], 0.1),
        (["privacy", "charged", 0, "round"], "6-0"),
        (["answers", 0, "round"], "6-0"),
        (["answers", 0, "estimates", 0, "value"], None),
        (["evidence", "log_origin"], "log.example/other"),
        (["approvals", 1, "key"], "00" * 32),
        (["approvals", 4, "log_index"], 4711),
        (["failures"], {"sleep": "It was not asked."}),
        (["more"], 1),
    ],
)
def test_a_document_that_says_otherwise_than_was_signed_is_found(
    released: tuple[dict[str, Any], Believed], path: list[Any], value: Any
) -> None:
    document, believed = released
    changed = json.loads(encode_document(document))
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ManifestError):
        check(changed, believed)


def test_a_question_without_an_answer_says_why(tmp_path: Path) -> None:
    why = "3 people survived; at least 1000 must."
    document, believed = make_believed(tmp_path, failures={"mood": why})
    check(document, believed)
    words = " ".join(Page(make_report(document, answer_hash="ab" * 32, released=1)).words)
    assert f"has no answer: {why}" in " ".join(words.split())
    for failures in ({}, {"mood": why, "steps": why}, {"steps": why}):
        with pytest.raises(ManifestError, match="what became of it"):
            check({**document, "failures": failures}, believed)


def test_a_signature_by_an_unknown_key_is_no_approval_in_a_release(tmp_path: Path) -> None:
    document, believed = make_believed(tmp_path)
    signed = parse_signed_study(document["evidence"]["signed_study"].encode())
    stranger = sign_study(signed.study, MemorySigner(), role="ethics-board")
    more = replace(signed, signatures=(*signed.signatures, stranger))
    step = {**document["approvals"][-1], "step": "approve", "role": "ethics-board"}
    step |= {"key": stranger.public_key.hex(), "log_index": step["log_index"] + 1}
    forged = {
        **document,
        "approvals": [*document["approvals"], step],
        "evidence": {**document["evidence"], "signed_study": more.encode().decode()},
    }
    with pytest.raises(ApprovalError, match="not enrolled"):
        check(forged, believed)


def test_more_rounds_than_were_approved_are_found(tmp_path: Path) -> None:
    document, believed = make_believed(tmp_path)
    charged = document["privacy"]["charged"]
    again = [{**one, "round": one["round"].replace("7-", "6-")} for one in charged]
    forged = {**document, "privacy": {**document["privacy"], "charged": [*charged, *again]}}
    with pytest.raises(ManifestError, match="More was spent than was approved"):
        check(forged, believed)


def test_a_number_that_is_none_is_no_document(tmp_path: Path) -> None:
    raw = encode_document(make(tmp_path))
    for bad in (b"NaN", b"Infinity", b"1e999"):
        with pytest.raises(ManifestError):
            parse_document(raw.replace(b'"value":5.41', b'"value":' + bad))
    for other in (b" " + raw, raw + b"\n", raw.replace(b'{"alarms"', b'{"alarms":[],"alarms"')):
        with pytest.raises(ManifestError, match="one form"):
            parse_document(other)
