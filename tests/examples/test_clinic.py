"""The example clinic is an ordinary FHIR server: who knows FHIR R4 gets what he expects."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fhir.resources.R4B import get_fhir_model_class
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.clinic import Loaded, load
from examples.clinic.fhir import answer
from examples.clinic.messages import Ask
from examples.clinic.search import PARAMETERS, terms, where
from examples.clinic.store import Store
from policies.consent import judge, parse_consent
from policies.labels import Labeller
from policies.model import Context, Principal, Request, Resource
from policies.tables import load_tables
from tests.interop.processes import free_port, get, started

PEOPLE = 6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loaded]:
    database = tmp_path_factory.mktemp("clinic") / "clinic.sqlite3"
    return database, load(database, PEOPLE)


@pytest.fixture(scope="module")
def full(loaded: tuple[Path, Loaded]) -> Iterator[Store]:
    """The loaded clinic, only to be read."""
    with Store(loaded[0]) as store:
        yield store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "clinic.sqlite3") as empty:
        yield empty


def ask(
    store: Store, method: str, url: str, body: Any = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    path, _, query = url.partition("?")
    reply = answer(
        store,
        Ask(
            method=method,
            path=path,
            query=query,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            body=body if isinstance(body, bytes) else json.dumps(body).encode() if body else b"",
            base="http://clinic/fhir",
        ),
    )
    found = json.loads(reply.body) if reply.body else None
    if found is not None:
        get_fhir_model_class(found["resourceType"]).model_validate(found)
    return reply.status, found, reply.headers


def ids(bundle: Any, mode: str = "match") -> list[str]:
    return [
        f"{entry['resource']['resourceType']}/{entry['resource']['id']}"
        for entry in bundle.get("entry", [])
        if entry["search"]["mode"] == mode
    ]


def patient(**changes: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", "name": [{"family": "Roth", "given": ["Ada"]}], **changes}


# --- One resource ---------------------------------------------------------------------------------


def test_every_version_of_a_resource_stays_readable(store: Store) -> None:
    assert ask(store, "PUT", "Patient/1", patient(id="1"))[0] == 201
    status, _, headers = ask(store, "PUT", "Patient/1", patient(id="1", active=True))
    assert (status, headers["etag"]) == (200, 'W/"2"')
    assert "active" not in ask(store, "GET", "Patient/1/_history/1")[1]
    assert ask(store, "GET", "Patient/1")[1]["active"] is True
    assert ask(store, "DELETE", "Patient/1")[0] == 204
    assert ask(store, "GET", "Patient/1")[0] == 410
    assert ask(store, "GET", "Patient/1/_history/2")[0] == 200
    methods = [e["request"]["method"] for e in ask(store, "GET", "Patient/1/_history")[1]["entry"]]
    assert methods == ["DELETE", "PUT", "POST"]
    assert ask(store, "GET", "Patient")[1]["total"] == 0


def test_an_update_of_another_version_than_the_current_is_refused(store: Store) -> None:
    created = ask(store, "POST", "Patient", patient())[1]
    place = f"Patient/{created['id']}"
    assert ask(store, "PUT", place, created, if_match='W/"7"')[0] == 412
    assert ask(store, "DELETE", place, if_match='W/"7"')[0] == 412
    assert ask(store, "PUT", place, created, if_match='W/"1"')[0] == 200
    assert ask(store, "GET", place, if_none_match='W/"2"')[0] == 304
    assert ask(store, "GET", place, if_none_match='W/"1"')[0] == 200


def test_a_patch_changes_what_it_names(store: Store) -> None:
    ask(store, "PUT", "Patient/1", patient(id="1"))
    kind = "application/json-patch+json"
    patch = [{"op": "replace", "path": "/name/0/family", "value": "Klein"}]
    assert ask(store, "PATCH", "Patient/1", patch, content_type=kind)[0] == 200
    assert ids(ask(store, "GET", "Patient?family=klein")[1]) == ["Patient/1"]
    assert ids(ask(store, "GET", "Patient?family=roth")[1]) == []
    wrong = [{"op": "remove", "path": "/nothing"}]
    assert ask(store, "PATCH", "Patient/1", wrong, content_type=kind)[0] == 422
    assert ask(store, "PATCH", "Patient/1", patch, content_type="text/plain")[0] == 415


@pytest.mark.parametrize(
    ("method", "url", "body", "status"),
    [
        ("POST", "Patient", b"{", 400),
        ("POST", "Patient", {"resourceType": "Observation"}, 400),
        ("PUT", "Patient/1", {"resourceType": "Patient", "id": "2"}, 400),
        ("GET", "Patient/none", None, 404),
        ("GET", "Wizard/1", None, 404),
        ("GET", "Patient?shoesize=44", None, 400),
        ("GET", "Patient?birthdate=yesterday", None, 400),
        ("GET", "Patient?family:sounds=x", None, 400),
        ("GET", "Patient?_count=-1", None, 400),
        ("GET", "Patient?_include=nonsense", None, 400),
        ("DELETE", "Patient", None, 405),
        ("POST", "", {"resourceType": "Bundle", "type": "searchset"}, 400),
    ],
)
def test_what_cannot_be_done_is_an_operation_outcome(
    store: Store, method: str, url: str, body: Any, status: int
) -> None:
    got, outcome, _ = ask(store, method, url, body)
    assert (got, outcome["resourceType"]) == (status, "OperationOutcome")


# --- Search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("Patient?_id=1,3", ["Patient/1", "Patient/3"]),
        ("Condition?patient=2&code=F10.20", ["Condition/2-substance-use"]),
        (
            "Condition?subject=Patient/2&code=http://hl7.org/fhir/sid/icd-10-cm|F10.20",
            ["Condition/2-substance-use"],
        ),
        ("Condition?subject:Patient=2&code=other|F10.20", []),
        ("Observation?code=44261-6&patient=1&date=2026-11", ["Observation/1-phq9"]),
        ("Observation?code=44261-6&patient=1&date=ge2026-11-03", []),
        ("Observation?code=44261-6&patient=1&date=lt2026-11-02T09:30:00Z", []),
        ("Observation?code=44261-6&patient=1&category=survey&status=final", ["Observation/1-phq9"]),
        ("DocumentReference?_security=PSYTHPN", ["DocumentReference/note-1"]),
        ("DocumentReference?author=1", ["DocumentReference/note-1"]),
        ("CareTeam?patient=1&status=active", ["CareTeam/1"]),
        ("CareTeam?participant=Practitioner/4", ["CareTeam/1-former"]),
        ("CareTeam?participant=Practitioner/4&date=ge2026", []),
        ("Patient?_has:Condition:patient:code=F10.20", ["Patient/2"]),
        ("Condition?patient._id=2&patient.name=zzz", []),
        ("Consent?patient=Patient/5", ["Consent/5"]),
        ("Practitioner?family:exact=Adler", ["Practitioner/1"]),
        ("Practitioner?name=adl", ["Practitioner/1"]),
        ("Practitioner?name:contains=dle", ["Practitioner/1"]),
        ("Patient?_sort=-_id&_count=500&_id:not=1,2,3,4", ["Patient/6", "Patient/5"]),
        ("Practitioner?birthdate:missing=false", []),
    ],
)
def test_a_search_finds_exactly_what_it_describes(
    full: Store, query: str, found: list[str]
) -> None:
    bundle = ask(full, "GET", query)[1]
    assert ids(bundle) == found
    assert bundle["total"] == len(found)
    kind, _, parameters = query.partition("?")
    assert ask(full, "POST", f"{kind}/_search", parameters.encode())[1]["total"] == len(found)


def test_pages_together_are_the_whole(full: Store) -> None:
    whole = ids(ask(full, "GET", "Observation?_count=500")[1])
    paged: list[str] = []
    url = "Observation?_count=7"
    while url:
        bundle = ask(full, "GET", url)[1]
        assert bundle["total"] == len(whole)
        paged += ids(bundle)
        following = [one["url"] for one in bundle["link"] if one["relation"] == "next"]
        url = following[0].removeprefix("http://clinic/fhir/") if following else ""
    assert paged == whole
    count = ask(full, "GET", "Observation?_summary=count")[1]
    assert (count["total"], "entry" in count) == (len(whole), False)


def test_included_resources_are_told_apart_from_those_found(full: Store) -> None:
    query = "Condition?code=F10.20&_include=Condition:subject&_include=Condition:encounter"
    bundle = ask(full, "GET", query)[1]
    assert (ids(bundle), ids(bundle, "include")) == (["Condition/2-substance-use"], ["Patient/2"])
    backwards = ask(full, "GET", "Patient?_id=1&_revinclude=CareTeam:patient")[1]
    assert ids(backwards, "include") == ["CareTeam/1", "CareTeam/1-former"]
    assert backwards["total"] == 1


def test_everything_of_a_patient_is_of_that_patient(full: Store) -> None:
    bundle = ask(full, "GET", "Patient/2/$everything")[1]
    kinds = {entry["resource"]["resourceType"] for entry in bundle["entry"]}
    assert kinds >= {"Patient", "Condition", "Observation", "Consent", "CareTeam"}
    for entry in bundle["entry"][1:]:
        resource = entry["resource"]
        whose = resource.get("subject") or resource.get("patient")
        assert whose == {"reference": "Patient/2"}


@given(
    node=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["coding", "code", "system", "family", "reference", "start", "end"]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    element=st.sampled_from(sorted({path for _, paths in PARAMETERS.values() for path in paths})),
)
@settings(max_examples=200, deadline=None)
def test_no_content_keeps_a_resource_from_being_stored(node: Any, element: str) -> None:
    for _ in terms({element.split(".", maxsplit=1)[0]: node}):
        pass


@given(
    name=st.sampled_from([n for n, (kind, _) in PARAMETERS.items() if kind in {"token", "string"}]),
    value=st.text(st.characters(exclude_characters=",\\"), min_size=1),
)
@settings(max_examples=200, deadline=None)
def test_a_value_is_never_part_of_the_text_of_a_query(name: str, value: str) -> None:
    assert where("Patient", [(name, value)])[0] == where("Patient", [(name, "x")])[0]


HOSTILE = st.sampled_from(
    ["'", '"', "' OR 1=1 --", "?", ");", "_has:", ":", ".", "name", "patient"]
)


@given(
    key=st.lists(HOSTILE | st.text(max_size=5), max_size=4).map("".join),
    value=HOSTILE | st.text(max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_searched_for_is_answered(full: Store, key: str, value: str) -> None:
    status, found, _ = ask(full, "GET", f"Patient?{urlencode({key: value})}")
    assert status in {200, 400}
    if status == 200 and "OR 1=1" in value:
        assert found["total"] == 0 or key.startswith("_") or ":not" in key


# --- Bundles --------------------------------------------------------------------------------------


def bundle(kind: str, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": kind, "entry": list(entries)}


def entry(method: str, url: str, resource: Any = None, name: str = "") -> dict[str, Any]:
    return {
        **({"fullUrl": name} if name else {}),
        **({"resource": resource} if resource else {}),
        "request": {"method": method, "url": url},
    }


def test_entries_of_a_transaction_may_refer_to_each_other(store: Store) -> None:
    name = "urn:uuid:61ebe359-bfdc-4613-8bf2-c5e300945f0a"
    flag = {
        "resourceType": "Observation", "status": "final", "code": {"text": "x"},
        "subject": {"reference": name},
    }  # fmt: skip
    status, done, _ = ask(
        store, "POST", "",
        bundle("transaction", entry("POST", "Observation", flag),
               entry("POST", "Patient", patient(), name)),
    )  # fmt: skip
    assert status == 200
    created = done["entry"][1]["resource"]["id"]
    assert done["entry"][0]["resource"]["subject"]["reference"] == f"Patient/{created}"
    assert ask(store, "GET", f"Observation?patient.family=roth&patient={created}")[1]["total"] == 1


def test_a_transaction_is_done_whole_or_not_at_all(store: Store) -> None:
    wrong = entry("PUT", "Patient/1", patient(id="2"))
    good = entry("POST", "Patient", patient())
    assert ask(store, "POST", "", bundle("transaction", good, wrong))[0] == 400
    assert ask(store, "GET", "Patient")[1]["total"] == 0
    status, done, _ = ask(store, "POST", "", bundle("batch", good, wrong))
    assert status == 200
    assert [one["response"]["status"] for one in done["entry"]] == ["201", "400"]
    assert ask(store, "GET", "Patient")[1]["total"] == 1


# --- What is in it --------------------------------------------------------------------------------


def test_loading_says_where_things_are(full: Store, loaded: tuple[Path, Loaded]) -> None:
    _, where_things_are = loaded
    assert len(where_things_are.patients) == PEOPLE
    for practitioner, patients in where_things_are.teams.items():
        teams = ask(full, "GET", f"CareTeam?participant={practitioner}&status=active")[1]
        found = {one["resource"]["subject"]["reference"] for one in teams.get("entry", [])}
        assert found == set(patients)
    assert where_things_are.teams["Practitioner/4"] == ()
    note = ask(full, "GET", where_things_are.psychotherapy_note)[1]
    assert note["author"] == [{"reference": where_things_are.note_author}]


def test_what_must_be_kept_closest_is_labelled_so(full: Store) -> None:
    labeller = Labeller(load_tables())
    note = ask(full, "GET", "DocumentReference/note-1")[1]
    dependence = ask(full, "GET", "Condition/2-substance-use")[1]
    assert "PSYTHPN" in labeller.label(note, kind="ehr").whole.codes
    assert "SUD" in labeller.label(dependence, kind="ehr").whole.codes


@pytest.mark.parametrize(("consent", "practitioner", "said"), [
    ("2", "1", "permits"), ("5", "1", "silent"), ("5", "2", "denies"),
])  # fmt: skip
def test_consents_can_be_judged(full: Store, consent: str, practitioner: str, said: str) -> None:
    found = ask(full, "GET", f"Consent/{consent}")[1]
    request = Request(
        principal=Principal(
            kind="user", id="x", references=frozenset({f"Practitioner/{practitioner}"})
        ),
        action="read",
        resource=Resource(
            service="ehr", kind="ehr", type="Condition", id="1", patient=consent,
            labels=frozenset({"42CFRPart2"}),
        ),
        context=Context(purpose="TREAT", now=1_795_000_000.0),
    )  # fmt: skip
    verdict = judge([parse_consent(found)], request)
    assert not verdict.unreadable
    assert (verdict.permits, verdict.denies) == (said == "permits", said == "denies")


# --- As a process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_url(loaded: tuple[Path, Loaded]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "examples.clinic", "--port", str(port)]
    with started([*command, "--database", str(loaded[0])], f"http://127.0.0.1:{port}/"):
        yield f"http://127.0.0.1:{port}"


def test_links_lead_back_to_where_the_client_asked(base_url: str) -> None:
    answered = get(f"{base_url}/fhir/Patient?_count=2")
    assert answered.headers["content-type"] == "application/fhir+json; charset=utf-8"
    found = json.loads(answered.body)
    following = next(one["url"] for one in found["link"] if one["relation"] == "next")
    assert following.startswith(f"{base_url}/fhir/Patient?")
    assert json.loads(get(following).body)["total"] == PEOPLE


def test_an_entry_in_the_diary_can_be_read_again(base_url: str) -> None:
    url = f"{base_url}/api/moods/1"
    before = json.loads(get(url).body)["total"]
    written = get(url, method="POST", body=b'{"mood": 8, "note": "Sun."}')
    assert written.status == 201
    assert json.loads(get(base_url + written.headers["location"]).body)["note"] == "Sun."
    assert json.loads(get(url).body)["total"] == before + 1
    for wrong in (
        b"{}",
        b"[]",
        b'{"mood": 11}',
        b'{"mood": true}',
        b'{"mood": 5, "note": 5}',
        b"{",
    ):
        assert get(url, method="POST", body=wrong).status == 400


def test_pages_and_what_they_need_are_served(base_url: str) -> None:
    for path, kind in {
        "/": "text/html; charset=utf-8", "/patients/1": "text/html; charset=utf-8",
        "/static/clinic.css": "text/css; charset=utf-8", "/static/linden.png": "image/png",
        "/static/patient.js": "text/javascript; charset=utf-8",
    }.items():  # fmt: skip
        answered = get(base_url + path)
        assert (answered.status, answered.headers["content-type"]) == (200, kind)
    assert get(f"{base_url}/static/linden.png").body.startswith(b"\x89PNG")
    for path in ("/static/..%2Fapp.py", "/static/../app.py", "/app.py"):
        assert get(base_url + path).status == 404


def test_the_program_ends_when_told_to(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "examples.clinic", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/"
    with started([*command, "--database", str(tmp_path / "x.sqlite3")], url) as process:
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_a_body_without_end_is_refused(base_url: str) -> None:
    assert get(f"{base_url}/api/moods/1", method="POST", body=b" " * 17_000_000).status == 413
