"""One clinic behind its gateway, from sign-in to erasure, as processes: nothing is imitated.

The tests share one site (`clinic_gateway`) and run in the order in which they stand: what is
written at first is looked for in every file at the end.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from contextlib import closing
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

import aics_tlog
import psutil  # type: ignore[import-untyped]
import pytest

from examples.visitor import Answer, Visitor, secret_of
from tests.e2e.running import Site, is_ready
from tests.havengate.command import run
from tests.interop.processes import get
from tests.openbao import wait_until

ORIGIN = "havengate.internal/log/1"
#: What is written through the gateway into fields that are sealed.
PHONE = "+43 1 555 7Q3X9"
NOTE = "Dreamt of a heron on the frozen lake."
TITLE = "Letter to the sister in Graz, never sent."
DIARY = "Counted seventeen swallows on the wire."
ERASED = "+43 1 555 8W5Z2"
SEALED = (PHONE, NOTE, TITLE, DIARY, ERASED)
#: What stands in a field that is not sealed: it has to be found where the sealed ones are not.
OPEN = "Kestrelmoor"


@pytest.fixture(scope="module")
def adler(clinic_gateway: Site) -> Visitor:
    """The clinician who treats Patient/1."""
    return clinic_gateway.signed_in("adler")


@pytest.fixture(scope="module")
def cruz(clinic_gateway: Site) -> Visitor:
    """The clinician who treats Patient/3 and Patient/9."""
    return clinic_gateway.signed_in("cruz")


@pytest.fixture(scope="module")
def dorn(clinic_gateway: Site) -> Visitor:
    """A clinician who treats nobody."""
    return clinic_gateway.signed_in("dorn")


@pytest.fixture(scope="module")
def patient(clinic_gateway: Site) -> Visitor:
    """Patient/1."""
    return clinic_gateway.signed_in("patient-1")


def expect(answer: Answer, status: int) -> Any:
    """What an answer says, if it has that status."""
    assert answer.status == status, answer.text[:500]
    return json.loads(answer.body) if answer.body[:1] in {b"{", b"["} else None


# --- Coming in ------------------------------------------------------------------------------------


def test_nobody_comes_in_without_both_factors(clinic_gateway: Site) -> None:
    stranger = clinic_gateway.stranger()
    expect(stranger.get("/fhir/Patient/1"), 401)
    account = clinic_gateway.accounts["brandt"]
    with pytest.raises(PermissionError, match="password"):
        stranger.sign_in("brandt", "a wrong one", account["second_factor_uri"])
    shown = stranger.form("sign-in", {"login": "brandt", "password": account["password"]})
    assert shown.status == 200
    expect(stranger.get("/fhir/Patient/2"), 401)
    with pytest.raises(PermissionError, match="code"):
        stranger.sign_in("brandt", account["password"], account["second_factor_uri"], at=1)
    expect(stranger.get("/fhir/Patient/2"), 401)


def test_nobody_comes_in_by_what_he_says_of_himself(clinic_gateway: Site) -> None:
    forged = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGxlciIsInJvbGVzIjpbImNsaW5pY2lhbiJdfQ."
    stranger = clinic_gateway.stranger()
    expect(stranger.get("/fhir/Patient/1", authorization=f"Bearer {forged}"), 401)
    expect(stranger.get("/fhir/Patient/1", **{"havengate-identity": forged}), 401)
    expect(stranger.get("/fhir/Patient/1", **{"x-havengate-role": "clinician"}), 401)
    expect(stranger.get("/fhir/%2e%2e/fhir/Patient/1"), 400)
    expect(stranger.get("/fhir/Patient/1", authorization="Bearer hgs_labs_guessed"), 401)


# --- Sealing --------------------------------------------------------------------------------------


def test_what_is_written_comes_back_to_who_may_read_it(adler: Visitor, patient: Visitor) -> None:
    record = expect(adler.get("/fhir/Patient/1"), 200)
    record["telecom"] = [{"system": "phone", "value": PHONE}]
    record["name"] = [{"family": OPEN, "given": ["Juno"]}]
    expect(adler.ask("PUT", "/fhir/Patient/1", body=record), 200)
    assert expect(adler.get("/fhir/Patient/1"), 200)["telecom"][0]["value"] == PHONE

    made = expect(adler.post("/fhir/Observation", observation(NOTE)), 201)
    read = expect(adler.get(f"/fhir/Observation/{made['id']}"), 200)
    assert read["note"][0]["text"] == NOTE

    made = expect(adler.post("/fhir/DocumentReference", document(TITLE)), 201)
    found = expect(adler.get("/fhir/DocumentReference?subject=Patient/1"), 200)
    told = {one["resource"]["id"]: one["resource"].get("description") for one in found["entry"]}
    assert told[made["id"]] == TITLE

    headers = {"content-type": "application/json"}
    expect(patient.post("/api/moods/1", {"mood": 7, "note": DIARY}, **headers), 201)
    mine = expect(patient.get("/api/moods/1"), 200)["entries"]
    assert DIARY in [entry["note"] for entry in mine]
    assert expect(patient.get("/fhir/Patient/1"), 200)["telecom"][0]["value"] == PHONE


def test_the_app_stores_only_ciphertext(clinic_gateway: Site) -> None:
    assert [path.name for path in clinic_gateway.files_with(OPEN)] != []
    for words in (PHONE, NOTE, TITLE, DIARY):
        assert clinic_gateway.files_with(words) == []
    for query in (
        "SELECT body FROM resource WHERE type = 'Patient' AND id = '1' ORDER BY version DESC",
        "SELECT note FROM mood WHERE patient = '1' ORDER BY at DESC",
    ):
        assert "hg1." in clinic_gateway.stored(query)


def test_a_sealed_value_is_found_by_its_exact_text_alone(adler: Visitor) -> None:
    found = expect(adler.get(f"/fhir/Patient?phone={quote(PHONE)}"), 200)
    assert [one["resource"]["id"] for one in found["entry"]] == ["1"]
    found = expect(adler.get(f"/fhir/Patient?phone={quote(PHONE[:-1])}"), 200)
    assert found.get("entry", []) == []


def test_ciphertext_of_one_person_cannot_be_planted_for_another(
    clinic_gateway: Site, adler: Visitor
) -> None:
    query = "SELECT note FROM mood WHERE patient = '1' ORDER BY at DESC"
    taken = clinic_gateway.stored(query)
    answer = adler.post("/fhir/Observation", observation(taken, "Patient/4"))
    assert answer.status in {400, 403, 422}, answer.text
    with closing(sqlite3.connect(clinic_gateway.home / "clinic.sqlite3")) as database, database:
        database.execute("UPDATE mood SET note = ? WHERE patient = '4'", (taken,))
    answer = adler.get("/api/moods/4")
    assert DIARY not in answer.text


# --- What the rules deny --------------------------------------------------------------------------


def test_a_patient_of_somebody_else_stays_closed(adler: Visitor, dorn: Visitor) -> None:
    for answer in (
        adler.get("/fhir/Patient/2"),
        adler.get("/fhir/Observation/2-phq9"),
        dorn.get("/fhir/Patient/1"),
        dorn.get("/api/moods/1"),
        dorn.ask("PUT", "/fhir/Patient/1", body={"resourceType": "Patient", "id": "1"}),
    ):
        assert answer.status in {403, 404}
        assert PHONE not in answer.text
        assert DIARY not in answer.text
    found = expect(adler.get("/fhir/Observation?code=44261-6"), 200)
    subjects = {one["resource"]["subject"]["reference"] for one in found["entry"]}
    assert subjects == {"Patient/1", "Patient/4", "Patient/6", "Patient/7"} & subjects
    assert found["total"] == len(found["entry"])


def test_a_psychotherapy_note_is_open_to_its_author_alone(
    adler: Visitor, dorn: Visitor, patient: Visitor
) -> None:
    expect(adler.get("/fhir/DocumentReference/note-1"), 200)
    for other in (dorn, patient):
        answer = other.get("/fhir/DocumentReference/note-1")
        assert answer.status in {403, 404}
        assert "brother" not in answer.text
    found = patient.get("/fhir/DocumentReference?patient=1")
    assert "brother" not in found.text
    assert "note-1" not in found.text


def test_reading_is_not_taking_away(adler: Visitor) -> None:
    answer = adler.get("/fhir/Patient/1/$everything")
    expect(answer, 403)
    assert OPEN not in answer.text


def test_a_program_does_no_more_than_its_scopes(clinic_gateway: Site) -> None:
    def labs(method: str, target: str, body: Any = None) -> Answer:
        return clinic_gateway.as_service("labs", method, target, body)

    expect(labs("GET", "/fhir/Observation/1-phq9"), 200)
    expect(labs("GET", "/fhir/Patient/1"), 403)
    assert labs("DELETE", "/fhir/Observation/1-phq9").status in {403, 404}
    expect(labs("GET", "/fhir/Observation/1-phq9"), 200)
    found = expect(labs("GET", "/fhir/Observation?patient=1&_include=Observation:subject"), 200)
    assert {one["resource"]["resourceType"] for one in found["entry"]} == {"Observation"}


def test_an_old_second_factor_has_to_be_shown_again(clinic_gateway: Site, adler: Visitor) -> None:
    let_pass(clinic_gateway, "adler", seconds=1_000)
    expect(adler.get("/fhir/Patient/1"), 200)
    refused = adler.get("/fhir/DocumentReference/note-1")
    assert refused.status == 401
    assert "insufficient_user_authentication" in refused.headers["www-authenticate"]
    assert "brother" not in refused.text
    assert clinic_gateway.step_up("adler", adler).status in {302, 303}
    expect(adler.get("/fhir/DocumentReference/note-1"), 200)


def test_break_glass_opens_one_record_until_it_is_closed_and_is_reviewed(
    clinic_gateway: Site, dorn: Visitor
) -> None:
    expect(dorn.get("/fhir/Patient/3"), 403)
    reason = "Found unconscious at the station"
    dorn.break_glass("3", reason, 30)
    record = expect(dorn.get("/fhir/Patient/3"), 200)
    expect(dorn.get("/fhir/Patient/6"), 403)
    answer = dorn.ask("PUT", "/fhir/Patient/3", body=record)
    assert answer.status == 403, "an emergency only reads"
    (grant,) = clinic_gateway.command("users", "break-glass")
    assert (grant["name"], grant["patient"], grant["reason"]) == ("dorn", "3", reason)
    shown = dorn.get("/.havengate/break-glass", accept="text/html")
    dorn._submit("break-glass/end", shown, {"grant": grant["grant"]})
    expect(dorn.get("/fhir/Patient/3"), 403)
    found = clinic_gateway.command("audit", "search", "--rule", "break-glass.open")
    assert len(found["exchanges"]) >= 1


# --- Sessions end at once, in every worker --------------------------------------------------------


def test_signing_out_ends_the_session_in_every_worker_at_once(clinic_gateway: Site) -> None:
    here, there = on_both_workers(clinic_gateway, "brandt")
    expect(there.get("/fhir/Patient/2"), 200)
    shown = here.get("/.havengate/account", accept="text/html")
    assert here._submit("sign-out", shown, {}).status in {302, 303}
    expect(there.get("/fhir/Patient/2"), 401)
    expect(here.get("/fhir/Patient/2"), 401)


def test_an_operator_ends_sessions_in_every_worker_at_once(clinic_gateway: Site) -> None:
    here, there = on_both_workers(clinic_gateway, "brandt")
    for visitor in (here, there):
        expect(visitor.get("/fhir/Patient/2"), 200)
    assert clinic_gateway.command("users", "lock", "brandt") == {"locked": "brandt"}
    for visitor in (here, there):
        expect(visitor.get("/fhir/Patient/2"), 401)
    clinic_gateway.command("users", "unlock", "brandt")


def test_a_consent_that_is_withdrawn_ends_what_is_being_received(
    clinic_gateway: Site, adler: Visitor, patient: Visitor
) -> None:
    refusal = {
        "resourceType": "Consent",
        "status": "active",
        "scope": {"coding": [{
            "system": "http://terminology.hl7.org/CodeSystem/consentscope",
            "code": "patient-privacy",
        }]},
        "category": [{"coding": [{"system": "http://loinc.org", "code": "59284-0"}]}],
        "patient": {"reference": "Patient/1"},
        "policyRule": {"coding": [{"code": "OPTIN"}]},
        "provision": {"type": "deny"},
    }  # fmt: skip
    with adler.receiving("/watch/1/trickle") as answer:
        assert answer.status == 200
        assert answer.read(16) == b"pulse+++" * 2
        made = patient.post("/fhir/Consent", refusal)
        expect(made, 201)
        try:
            # It goes on for as long as it is let: the app never ends it.
            with pytest.raises((HTTPException, OSError)):
                all(iter(lambda: answer.read(50_000), b""))
        finally:
            kept = made.json()
            expect(
                patient.ask(
                    "PUT", f"/fhir/Consent/{kept['id']}", body=kept | {"status": "inactive"}
                ),
                200,
            )
    found = clinic_gateway.command("audit", "search", "--patient", "Patient/1", "--limit", "1000")
    ended = [
        entry["outcome"]
        for one in found["exchanges"]
        for entry in one["entries"]
        if entry.get("reason") == "gateway.no_longer_allowed" and entry["stage"] == "outcome"
    ]
    assert ended == ["aborted"]
    wait_until(lambda: adler.get("/fhir/Patient/1").status == 200)


# --- What happens when something fails ------------------------------------------------------------


def test_an_app_that_is_too_slow_is_named_and_asked_once(
    clinic_gateway: Site, adler: Visitor
) -> None:
    courses = clinic_gateway.courses
    expect(adler.get("/courses/sleep"), 200)
    answer = adler.ask("POST", "/courses/slow", body=b"finished lesson 3")
    problem = expect(answer, 504)
    assert "did not answer in time" in problem["detail"]
    assert "not known" in problem["detail"]
    courses.go.set()
    expect(adler.get("/courses/sleep"), 200)
    assert courses.asked.count(("POST", "/courses/slow")) == 1


def test_an_app_that_is_down_is_named_and_used_again_once_it_is_back(
    clinic_gateway: Site, adler: Visitor
) -> None:
    clinic_gateway.clinic.kill()
    try:
        page = adler.get("/static/clinic.css", accept="text/html")
        assert page.status == 502
        assert "The application behind" in page.text
        assert adler.get("/fhir/Patient/1").status in {502, 503}
    finally:
        clinic_gateway.clinic.start()
    wait_until(lambda: adler.get("/fhir/Patient/1").status == 200)


def test_nothing_is_done_or_released_while_the_log_does_not_answer(
    clinic_gateway: Site, adler: Visitor, patient: Visitor
) -> None:
    count = "SELECT count(*) FROM mood"
    before = clinic_gateway.stored(count)
    headers = {"content-type": "application/json"}
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(patient.post("/api/moods/1", {"mood": 3, "note": "later"}, **headers))

    def read() -> None:
        answers.append(adler.get("/fhir/Patient/1"))

    threads = [threading.Thread(target=ask), threading.Thread(target=read)]
    with clinic_gateway.gateway.frozen():
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert answers == []
        assert clinic_gateway.stored(count) == before
    for thread in threads:
        thread.join(30)
    assert sorted(answer.status for answer in answers) == [200, 201]


def test_a_worker_that_is_killed_is_replaced(clinic_gateway: Site, adler: Visitor) -> None:
    gateway = clinic_gateway.gateway
    expect(adler.get("/fhir/Patient/1"), 200)
    killed = gateway.worker_of(adler)
    psutil.Process(killed).kill()

    def serves() -> bool:
        try:
            return adler.get("/fhir/Patient/1").status == 200
        except (OSError, HTTPException):
            adler.close()
            return False

    wait_until(serves)
    wait_until(lambda: len(gateway.workers()) == 2 and is_ready(f"{gateway.admin}/readyz"))
    assert killed not in [worker.pid for worker in gateway.workers()]


def test_without_the_key_server_what_it_must_open_is_refused_and_then_open_again(
    clinic_gateway: Site, cruz: Visitor
) -> None:
    server = clinic_gateway.gateway.key_server()
    server.suspend()
    answer = cruz.get("/fhir/Patient/9")
    assert answer.status == 503
    assert "retry-after" in answer.headers
    server.kill()
    wait_until(lambda: cruz.get("/fhir/Patient/9").status == 200)
    assert clinic_gateway.gateway.key_server().pid != server.pid


# --- Erasing --------------------------------------------------------------------------------------


def test_an_erased_person_is_gone_from_sealed_fields_and_from_the_log(
    clinic_gateway: Site, cruz: Visitor
) -> None:
    record = expect(cruz.get("/fhir/Patient/3"), 200)
    record["telecom"] = [{"system": "phone", "value": ERASED}]
    expect(cruz.ask("PUT", "/fhir/Patient/3", body=record), 200)
    assert expect(cruz.get("/fhir/Patient/3"), 200)["telecom"][0]["value"] == ERASED
    search = ("audit", "search", "--patient", "Patient/3", "--limit", "1000")
    before = clinic_gateway.command(*search)["exchanges"]
    assert len(before) >= 3

    receipt = clinic_gateway.command("keys", "erase", "Patient/3", "--yes")
    assert receipt["decryption_attempted_afterwards"] == "keys.person_erased"

    after = clinic_gateway.command(*search, "--reveal")["exchanges"]
    assert {one["request"] for one in before}.isdisjoint(one["request"] for one in after)
    shown = clinic_gateway.command("audit", "search", "--reveal", "--limit", "1000")["exchanges"]
    blind = {one["request"]: one["names"]["patients"] for one in shown}
    for one in before:
        assert "Patient/3" not in str(blind[one["request"]])
    wait_until(lambda: ERASED not in cruz.get("/fhir/Patient/3").text)
    left = expect(cruz.get("/fhir/Patient/3"), 200)
    assert left["name"] == record["name"]
    assert "value" not in left["telecom"][0]
    assert left["telecom"][0]["system"] == "phone"


# --- The disk fails, and the end ------------------------------------------------------------------


def test_nothing_is_done_or_released_when_the_log_cannot_be_written(
    clinic_gateway: Site, adler: Visitor, patient: Visitor
) -> None:
    gateway = clinic_gateway.gateway
    count = "SELECT count(*) FROM mood"
    before = clinic_gateway.stored(count)
    headers = {"content-type": "application/json"}
    with gateway.unable_to_write():
        for answer in (
            adler.get("/fhir/Patient/1"),
            adler.get("/fhir/Observation?patient=1"),
            adler.get("/courses/sleep"),
            patient.post("/api/moods/1", {"mood": 3, "note": "lost"}, **headers),
        ):
            assert answer.status == 503
            assert OPEN not in answer.text
        assert clinic_gateway.stored(count) == before
        wait_until(lambda: get(f"{gateway.admin}/readyz").status == 503)
    # What the disk kept is not known: only a start that checks it helps.
    expect(adler.get("/fhir/Patient/1"), 503)


def test_ctrl_c_ends_everything_and_the_next_start_goes_on(
    clinic_gateway: Site, adler: Visitor
) -> None:
    assert clinic_gateway.gateway.stop(signal.SIGINT) == 0
    assert not is_ready(f"{clinic_gateway.gateway.admin}/readyz")
    clinic_gateway.gateway.start()
    adler.close()
    assert expect(adler.get("/fhir/Patient/1"), 200)["telecom"][0]["value"] == PHONE


def test_the_log_is_sound_and_nothing_in_it_is_open(clinic_gateway: Site) -> None:
    found = clinic_gateway.command("audit", "verify")
    assert found["sound"]
    assert (found["dangling_count"], found["orphan_count"]) == (0, 0)
    assert found["size"] > 100


def test_an_independent_program_accepts_the_log(clinic_gateway: Site) -> None:
    keys = clinic_gateway.command("audit", "key")["verifier_keys"]
    log = clinic_gateway.home / "var/audit"
    note = aics_tlog.parse_note((log / "checkpoint").read_bytes())
    tried = [
        aics_tlog.verify_checkpoint(note, aics_tlog.parse_vkey(key), expected_origin=ORIGIN)
        for key in keys
    ]
    (found,) = [result for result in tried if result.ok]
    assert found.size is not None
    assert found.root is not None
    files = aics_tlog.FileSystemTileReader(log)
    assert aics_tlog.audit_tiles(files, found.size, found.root).size == found.size


def test_one_changed_byte_of_the_log_is_found(clinic_gateway: Site) -> None:
    log = clinic_gateway.home / "var/audit"
    tile = max((log / "tile/entries").rglob("*"), key=lambda path: path.is_file())
    kept = tile.read_bytes()
    tile.chmod(0o600)
    tile.write_bytes(kept[:200] + bytes([kept[200] ^ 1]) + kept[201:])
    try:
        code, _, _ = run(clinic_gateway.home, "audit", "verify")
    finally:
        tile.write_bytes(kept)
    assert code == 1
    assert run(clinic_gateway.home, "audit", "verify")[0] == 0


def test_nothing_secret_is_in_any_file_or_in_what_was_said(
    clinic_gateway: Site, adler: Visitor
) -> None:
    assert [path.name for path in clinic_gateway.files_with(OPEN)] != []
    secrets = [*SEALED, *clinic_gateway.service_keys.values(), *adler.cookies.values()]
    for account in clinic_gateway.accounts.values():
        secrets += [account["password"], secret_of(account["second_factor_uri"])]
    for secret in secrets:
        assert clinic_gateway.files_with(secret) == [], secret[:4]
    # Who was treated, and by whom, is nowhere but in the apps' and the directory's databases.
    for path in (*clinic_gateway.files_with("Patient/1"), *clinic_gateway.files_with("dorn")):
        assert path.name.startswith(("clinic.sqlite3", "gateway.sqlite3")), path
    assert "Traceback" not in clinic_gateway.gateway.words


# --- Small things ---------------------------------------------------------------------------------


def observation(note: str, patient: str = "Patient/1") -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "status": "final",
        "code": {"text": "Conversation"},
        "subject": {"reference": patient},
        "note": [{"text": note}],
    }


def document(description: str) -> dict[str, Any]:
    return {
        "resourceType": "DocumentReference",
        "status": "current",
        "subject": {"reference": "Patient/1"},
        "description": description,
        "content": [{"attachment": {"contentType": "text/plain", "data": "TGV0dGVyLg=="}}],
    }


def let_pass(site: Site, name: str, *, seconds: int) -> None:
    """Let the second factors of a person be older."""
    with closing(sqlite3.connect(site.home / "var/gateway.sqlite3")) as database, database:
        database.execute(
            "UPDATE sessions SET second_factor_at = second_factor_at - ? "
            "WHERE account = (SELECT id FROM accounts WHERE login = ?)",
            (seconds, name),
        )


def on_both_workers(site: Site, name: str) -> tuple[Visitor, Visitor]:
    """One session, on a connection to each of the two workers."""
    here = site.signed_in(name)
    for _ in range(60):
        there = site.stranger()
        there.cookies = dict(here.cookies)
        there.get("/.havengate/jwks.json")
        if site.gateway.worker_of(there) != site.gateway.worker_of(here):
            return here, there
        there.close()
    raise AssertionError("one worker takes all connections")
