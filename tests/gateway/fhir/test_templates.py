"""What was seen before is answered as if it were not, and nothing that was sealed is kept."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.fhir import templates
from gateway.fhir.templates import KEPT_S, Templates
from gateway.settings import FieldSettings
from policies.settings import PoliciesSettings
from policies.store import InForce, load_in_force
from tests.gateway.core.world import World
from tests.gateway.fhir import real_content
from tests.gateway.fhir.clinic import (
    NOW,
    Answer,
    Clinic,
    FHIRApp,
    clinician,
    note,
    observation,
    patient,
)

LABEL = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "SDV"}
FIELDS = (
    FieldSettings(path="Observation.valueString", seal=True),
    FieldSettings(path="Observation.note.text", seal=True),
    FieldSettings(path="Observation.component.valueString", seal=True),
)
SECRET = "Speaks of the brother"

_RULE = """
@id("own.rule") @title("a rule") @cites("a test") @grants("nothing")
{obligation}
permit (
  principal is User in Role::"clinician",
  action in [Action::"read", Action::"search"],
  resource is Record in Label::"SDV"
);
"""


def rules(tmp_path: Path, obligation: str) -> Callable[[], InForce]:
    (tmp_path / "own.cedar").write_text(_RULE.format(obligation=obligation))
    own = load_in_force(PoliciesSettings(directory=str(tmp_path)))
    return lambda: own


def templates_of(here: Clinic) -> Templates:
    found = here.site.handlers["ehr"]._templates  # type: ignore[attr-defined]
    assert isinstance(found, Templates)
    return found


def sealed_clinic(*observations: dict[str, Any], **more: Any) -> Clinic:
    """A clinic into whose app these were written through the gateway."""
    here = Clinic(FHIRApp([patient("p1"), patient("p2")]), fields=FIELDS, **more)
    for one in observations:
        answer = here.ask("PUT", f"/Observation/{one['id']}", one)
        assert answer.status in {200, 201}, answer.body
    return here


def spoken(one: str, of: str = "p1", **more: Any) -> dict[str, Any]:
    return observation(
        one, of, valueString=f'Slept "badly" \\ {one} ☾', note=[{"text": SECRET}], **more
    )


def four(here: Clinic, target: str) -> list[Answer]:
    """The same request again and again. In the end there must be templates."""
    answers = [here.get(target) for _ in range(4)]
    assert len(templates_of(here)) > 0
    return answers


def alike(answers: list[Answer]) -> bool:
    first = answers[0]
    return all((one.status, one.body) == (first.status, first.body) for one in answers)


# --- The same answer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["/Observation", "/Observation/a", "/Observation?_summary=data", "/Observation?_elements=note",
     "/Observation/_history", "/Observation?_total=accurate", "/Observation?patient=p1&_count=1"],
)  # fmt: skip
def test_the_answer_is_the_same_every_time(target: str) -> None:
    here = sealed_clinic(spoken("a"), spoken("b"), spoken("c", meta={"security": [LABEL]}))
    answers = four(here, target)
    links = re.compile(rb"_hg_page=[^\"]+|\?[a-z_-]+=[A-Za-z0-9_.-]{40,}")
    assert len({links.sub(b"", one.body) for one in answers}) == 1
    assert "elements" in target or "Slept" in answers[-1].body.decode()


@pytest.mark.parametrize(
    ("obligation", "kept"),
    [
        ('@obligation_redact("Observation.note")', True),
        ('@obligation_redact("Observation.note.text, Observation.value")', True),
        ('@obligation_mask("Observation.value")', True),
        ('@obligation_notice("42CFR2.32")', True),
        ('@obligation_pseudonymise("Observation.subject")', False),
    ],
)
def test_what_an_obligation_hides_is_hidden_every_time(
    tmp_path: Path, *, obligation: str, kept: bool
) -> None:
    labelled = spoken("a", meta={"security": [LABEL]})
    here = sealed_clinic(labelled, spoken("b"), rules=rules(tmp_path, obligation))
    answers = four(here, "/Observation")
    assert alike(answers)
    assert answers[0].headers == answers[-1].headers
    [own] = [e["resource"] for e in answers[-1].json["entry"] if e["resource"]["id"] == "a"]
    if "note" in obligation:
        assert (SECRET in str(own)) == ("notice" in obligation)
    if "value" in obligation:
        assert "Slept" not in str(own)
    if "pseudonymise" in obligation:
        assert "Patient/p1" not in str(own)
    forms = [one.shown for one in templates_of(here)._kept.values() if one.record.id == "a"]
    assert bool(forms[0]) == kept


def test_each_purpose_has_its_pseudonyms_every_time(tmp_path: Path) -> None:
    labelled = spoken("a", meta={"security": [LABEL]})
    own = rules(tmp_path, '@obligation_pseudonymise("Observation.subject")')
    here = sealed_clinic(labelled, rules=own)
    treating = four(here, "/Observation/a")
    here.who = replace(clinician(), purpose="COORD")
    coordinating = four(here, "/Observation/a")
    assert alike(treating)
    assert alike(coordinating)
    assert treating[0].body != coordinating[0].body


def test_real_records_are_the_same_every_time() -> None:
    """Third-party records, some of whose elements are sealed as they are."""
    found = [one for one in real_content.of_type("Observation") if "valueCodeableConcept" in one]
    found = [one for one in found if "subject" in one][:40]
    team = frozenset(one["subject"]["reference"].partition("/")[2] for one in found)
    fields = (
        FieldSettings(path="Observation.valueCodeableConcept", seal=True),
        FieldSettings(path="Observation.code.text", seal=True),
    )
    here = Clinic(FHIRApp(map(patient, team)), fields=fields, team=team)
    for one in found:
        assert here.ask("PUT", f"/Observation/{one['id']}", one).status == 201
    answers = [here.get("/Observation?_count=100") for _ in range(4)]
    assert alike(answers)
    assert len(answers[0].ids) == len(found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3)
)
def test_any_text_comes_back_as_it_was_every_time(words: list[str]) -> None:
    own = observation("a", "p1", note=[{"text": one} for one in words])
    answers = four(sealed_clinic(own), "/Observation")
    assert alike(answers)
    assert answers[-1].json["entry"][0]["resource"]["note"] == [{"text": one} for one in words]


# --- Decided anew ---------------------------------------------------------------------------------


def test_a_record_seen_by_one_is_closed_to_another() -> None:
    here = sealed_clinic(spoken("a"))
    four(here, "/Observation")
    assert here.as_(clinician(references=frozenset({"Practitioner/9"}))).get("/Observation").ids
    here.team = frozenset()
    assert here.get("/Observation/a").status == 404
    assert here.get("/Observation").ids == []


def test_a_record_that_changes_is_understood_anew() -> None:
    here = sealed_clinic(spoken("a"))
    four(here, "/Observation")
    psychotherapy = note("a", "p1")["meta"]
    app: Any = here.app
    app.store({**app.now("Observation", "a"), "meta": psychotherapy})
    assert [here.get("/Observation").ids for _ in range(3)] == [[], [], []]


def test_ciphertext_put_into_another_patients_record_stays_closed() -> None:
    here = sealed_clinic(spoken("a"), spoken("b", "p2"))
    four(here, "/Observation")
    app: Any = here.app
    moved = {**app.now("Observation", "a"), "subject": {"reference": "Patient/p2"}}
    app.store(moved)
    for _ in range(4):
        assert here.get("/Observation/a").status == 502


def test_an_erased_person_stays_erased_though_the_record_was_seen() -> None:
    here = sealed_clinic(spoken("a"))
    four(here, "/Observation")
    here.sealer.erase("Patient/p1")
    for target in ("/Observation", "/Observation/a"):
        for _ in range(3):
            answer = here.get(target)
            assert answer.status == 200
            assert SECRET not in answer.body.decode()


def test_tables_that_change_label_anew(tmp_path: Path) -> None:
    here = sealed_clinic(spoken("a"))
    four(here, "/Observation")
    assert len(templates_of(here)) == 1
    before = here.world.outcomes()[-1].end.labels
    tables = tmp_path / "tables"
    tables.mkdir()
    other = load_in_force(PoliciesSettings())
    here.site = replace(here.site, in_force=lambda: other)
    here.get("/Observation")
    assert len(templates_of(here)) == 0
    assert here.world.outcomes()[-1].end.labels == before


# --- Nothing kept that was sealed -----------------------------------------------------------------


def test_no_template_holds_what_was_sealed(tmp_path: Path) -> None:
    labelled = spoken("a", meta={"security": [LABEL]})
    own = rules(tmp_path, '@obligation_redact("Observation.value")')
    here = sealed_clinic(labelled, spoken("b"), rules=own)
    four(here, "/Observation")
    four(here, "/Observation/a")
    kept = templates_of(here)._kept
    assert len(kept) == 2
    for raw, one in kept.items():
        everything = [raw, *one.form.pieces, *one.marks, *map(str.encode, one.texts)]
        everything += [piece for form in one.shown.values() for piece in form.pieces]
        everything.append(repr(one.record.content).encode())
        together = b"\0".join(everything)
        assert SECRET.encode() not in together
        assert b"Slept" not in together
        assert one.record.content == {}


def test_what_is_kept_has_an_end() -> None:
    here = sealed_clinic(*(spoken(f"o{n}") for n in range(12)))
    found = templates_of(here)
    found._max_bytes = 8_000
    for _ in range(4):
        here.get("/Observation?_count=100")
        assert found._size <= 8_000
        assert found._size == sum(one.size for one in found._kept.values())
    assert 0 < len(found) < 12


def test_one_record_that_comes_many_times_is_counted_once() -> None:
    here = sealed_clinic(spoken("a"))
    app = here.app

    def twenty_times(head: Any, body: bytes) -> Any:
        status, headers, content = app(head, body)
        bundle = orjson.loads(content)
        if bundle["resourceType"] == "Bundle":
            bundle["entry"] = bundle["entry"] * 20
        return status, headers, orjson.dumps(bundle)

    here.app = twenty_times
    for _ in range(4):
        here.get("/Observation?_count=100")
        found = templates_of(here)
        assert found._size == sum(one.size for one in found._kept.values())
    assert len(found) == 1


def test_what_is_counted_is_what_is_there() -> None:
    many = [{"text": f"{SECRET} {n}"} for n in range(200)]
    here = sealed_clinic(*(observation(f"o{n}", "p1", note=many) for n in range(20)))
    here.get("/Observation?_count=100")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        here.get("/Observation?_count=100")
        here.world = World()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(templates_of(here)) == 20
    assert after - before < 2 * templates_of(here)._size


def test_what_is_too_old_leaves_memory_though_it_never_comes_again() -> None:
    here = sealed_clinic(spoken("a"), spoken("b"))
    four(here, "/Observation/a")
    [raw] = templates_of(here)._kept
    here.site = replace(here.site, clock=lambda: NOW + KEPT_S + 1)
    here.get("/Observation/b")
    assert raw not in templates_of(here)._kept


def test_what_is_known_to_have_come_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SEEN", 4)
    here = sealed_clinic(*(spoken(f"o{n}") for n in range(12)))
    here.get("/Observation?_count=100")
    assert len(templates_of(here)._seen) == 4


@pytest.mark.parametrize("later", [KEPT_S + 1, -1.0])
def test_a_template_is_used_for_a_while_only(later: float) -> None:
    here = sealed_clinic(spoken("a"))
    four(here, "/Observation")
    [before] = templates_of(here)._kept.values()
    here.site = replace(here.site, clock=lambda: NOW + later)
    assert here.get("/Observation").status == 200
    assert before not in templates_of(here)._kept.values()


def test_forgotten_keys_take_the_templates_with_them() -> None:
    here = sealed_clinic(spoken("a"))
    four(here, "/Observation")
    here.sealer.generation += 1
    assert here.get("/Observation").status == 200
    assert len(templates_of(here)) == 0


def test_a_template_that_would_say_something_else_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(templates.Form, "filled", lambda _self, _values: b"{}")
    here = sealed_clinic(spoken("a"))
    answers = [here.get("/Observation") for _ in range(4)]
    assert alike(answers)
    assert SECRET in answers[-1].body.decode()
    assert len(templates_of(here)) == 0


def test_records_without_a_patient_of_their_own_are_never_kept() -> None:
    here = Clinic(FHIRApp([patient("p1")]), fields=FIELDS)
    app: Any = here.app
    app.store({"resourceType": "Observation", "id": "x", "status": "final"})
    for _ in range(3):
        assert here.get("/Observation/x").status == 404
    assert len(templates_of(here)) == 0


def test_orjson_writes_a_fragment_as_it_is() -> None:
    assert orjson.dumps({"a": orjson.Fragment(b'{"b":1.50}')}) == b'{"a":{"b":1.50}}'
