"""Pseudonyms: stable, unlinkable, and undone only by two officers, once, in time, on record."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keys.bootstrap import create_officer
from keys.errors import ApprovalError, PersonErasedError, VaultDeniedError, VaultRejectedError
from keys.pseudonyms import REQUEST_LIFE_S, Half, Pseudonymiser
from keys.reidentification import VaultHalves, VaultOfficer
from keys.transit import TransitKeyWrapper
from keys.vault import VaultClient
from tests.keys.fakes import LogDownError
from tests.keys.workbench import TENANT, Workbench, database_files, workbench
from tests.openbao import RunningServer


@dataclass
class FakeHalves:
    """Two keys that the gateway can only encrypt with."""

    keys: dict[Half, bytes] = field(
        default_factory=lambda: {"first": os.urandom(32), "second": os.urandom(32)}
    )

    def encrypt(self, half: Half, *, context: bytes, plaintext: bytes) -> str:
        nonce = os.urandom(12)
        box = nonce + AESGCM(self.keys[half]).encrypt(nonce, plaintext, context)
        return base64.b64encode(box).decode()


@dataclass
class FakeOfficer:
    """Somebody whom the key server lets open one half."""

    called: str
    half: Half
    halves: FakeHalves

    def name(self) -> str:
        return self.called

    def decrypt(self, half: Half, *, context: bytes, ciphertext: str) -> bytes:
        if half != self.half:
            raise VaultDeniedError("permission denied")
        box = base64.b64decode(ciphertext)
        try:
            return AESGCM(self.halves.keys[half]).decrypt(box[:12], box[12:], context)
        except InvalidTag as error:
            raise VaultRejectedError("does not open") from error


@dataclass
class Office:
    bench: Workbench
    pseudonymiser: Pseudonymiser
    anna: FakeOfficer
    bert: FakeOfficer

    def pseudonym(self, person: str = "ada", purpose: str = "study-1") -> str:
        return self.pseudonymiser.pseudonym(tenant=TENANT, purpose=purpose, person=person)

    def request(self, pseudonym: str | None = None) -> str:
        return self.pseudonymiser.request(
            self.anna,
            tenant=TENANT,
            pseudonym=pseudonym or self.pseudonym(),
            reason="patient-safety",
        )

    def approve(self, request_id: str, officer: FakeOfficer | None = None) -> None:
        self.pseudonymiser.approve(officer or self.bert, tenant=TENANT, request_id=request_id)

    def reveal(self, request_id: str, officer: FakeOfficer | None = None) -> str:
        return self.pseudonymiser.reveal(officer or self.anna, tenant=TENANT, request_id=request_id)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with workbench(tmp_path / "keys.sqlite3") as bench:
        halves = FakeHalves()
        yield Office(
            bench=bench,
            pseudonymiser=Pseudonymiser(
                bench.keyring, database=bench.database, halves=halves, recorder=bench.recorder
            ),
            anna=FakeOfficer("anna", "first", halves),
            bert=FakeOfficer("bert", "second", halves),
        )


# --- Pseudonyms -----------------------------------------------------------------------------------


def test_a_pseudonym_is_stable_within_a_purpose(office: Office) -> None:
    assert office.pseudonym() == office.pseudonym()
    office.bench.store.empty()
    assert len({office.pseudonym() for _ in range(3)}) == 1
    assert office.pseudonym().startswith("hgp1.")
    assert len(office.pseudonym()) == len("hgp1.") + 22


def test_pseudonyms_differ_across_purposes_persons_tenants_and_installations(
    office: Office, tmp_path: Path
) -> None:
    made = {office.pseudonym(), office.pseudonym(purpose="study-2"), office.pseudonym("bob")}
    made.add(office.pseudonymiser.pseudonym(tenant="clinic-b", purpose="study-1", person="ada"))
    with workbench(tmp_path / "other") as bench:
        other = Pseudonymiser(
            bench.keyring,
            database=bench.database,
            halves=FakeHalves(),
            recorder=bench.recorder,
        )
        made.add(other.pseudonym(tenant=TENANT, purpose="study-1", person="ada"))
    assert len(made) == 5


def test_the_table_does_not_show_who_is_behind_a_pseudonym(office: Office, tmp_path: Path) -> None:
    office.pseudonym("Ada-Example")
    for content in database_files(tmp_path / "keys.sqlite3").values():
        assert b"Ada-Example" not in content


def test_after_erasure_a_person_never_gets_the_same_pseudonym_again(office: Office) -> None:
    """Not even somebody who knows the name and holds every key can compute the old one."""
    old = office.pseudonym()
    office.bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert office.pseudonym() != old


# --- The way back ---------------------------------------------------------------------------------


def test_two_officers_learn_the_name_once(office: Office) -> None:
    request_id = office.request()
    office.approve(request_id)
    assert office.reveal(request_id) == "ada"
    with pytest.raises(ApprovalError, match="used"):
        office.reveal(request_id)
    with pytest.raises(ApprovalError):
        office.approve(request_id)


def test_one_officer_alone_learns_nothing(office: Office) -> None:
    request_id = office.request()
    with pytest.raises(ApprovalError):
        office.approve(request_id, office.anna)
    with pytest.raises(ApprovalError, match="approved"):
        office.reveal(request_id)


def test_one_officer_who_holds_both_halves_still_needs_another(office: Office) -> None:
    both = FakeOfficer("anna", "second", office.anna.halves)
    request_id = office.request()
    with pytest.raises(ApprovalError, match="second officer"):
        office.approve(request_id, both)


@pytest.mark.parametrize("wrong", ["approver", "revealer"])
def test_an_officer_of_the_wrong_half_is_refused_by_the_key_server(
    office: Office, wrong: str
) -> None:
    request_id = office.request()
    if wrong == "approver":
        with pytest.raises(ApprovalError, match="second half"):
            office.approve(request_id, FakeOfficer("carl", "first", office.anna.halves))
        return
    office.approve(request_id)
    with pytest.raises(ApprovalError, match="first half"):
        office.reveal(request_id, FakeOfficer("anna", "second", office.anna.halves))


def test_only_the_officer_who_requested_may_reveal(office: Office) -> None:
    request_id = office.request()
    office.approve(request_id)
    with pytest.raises(ApprovalError, match="requested"):
        office.reveal(request_id, FakeOfficer("carl", "first", office.anna.halves))
    assert office.reveal(request_id) == "ada"


def test_a_request_dies_with_its_time(office: Office) -> None:
    early, late = office.request(), office.request()
    office.approve(early)
    office.bench.clock.advance(REQUEST_LIFE_S)
    with pytest.raises(ApprovalError, match="old"):
        office.reveal(early)
    with pytest.raises(ApprovalError, match="old"):
        office.approve(late)


def test_an_approval_does_not_serve_another_request(office: Office) -> None:
    approved, other = office.request(), office.request(office.pseudonym("bob"))
    office.approve(approved)
    with office.bench.database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE reidentifications SET approved_by = 'bert', half_opened ="
            " (SELECT half_opened FROM reidentifications WHERE request_id = ?)"
            " WHERE request_id = ?",
            (approved, other),
        )
    with pytest.raises(Exception, match="did not open"):
        office.reveal(other)


def test_a_request_of_another_tenant_is_not_found(office: Office) -> None:
    request_id = office.request()
    with pytest.raises(ApprovalError):
        office.pseudonymiser.approve(office.bert, tenant="clinic-b", request_id=request_id)


@pytest.mark.parametrize("reason", ["", "She asked me to", "x" * 65, "a\nb"])
def test_a_reason_is_a_code(office: Office, reason: str) -> None:
    with pytest.raises(ApprovalError):
        office.pseudonymiser.request(
            office.anna, tenant=TENANT, pseudonym=office.pseudonym(), reason=reason
        )


def test_an_unknown_pseudonym_cannot_be_asked_for(office: Office) -> None:
    with pytest.raises(ApprovalError):
        office.request("hgp1.AAAAAAAAAAAAAAAAAAAAAA")


def test_erasing_the_person_ends_every_way_back(office: Office) -> None:
    pseudonym = office.pseudonym()
    approved, requested = office.request(), office.request()
    office.approve(approved)
    receipt = office.bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert receipt.pseudonyms_deleted == 1
    for attempt in (
        lambda: office.reveal(approved),
        lambda: office.approve(requested),
        lambda: office.request(pseudonym),
    ):
        with pytest.raises(ApprovalError):
            attempt()


def test_a_mapping_kept_from_before_the_erasure_does_not_open(office: Office) -> None:
    """Rows from a backup, put back: they were sealed under the key that is gone."""
    pseudonym = office.pseudonym()
    with office.bench.database.reading() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM pseudonyms").fetchall()
    office.bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    with office.bench.database.writing() as connection:
        for row in rows:
            connection.exec_driver_sql("INSERT INTO pseudonyms VALUES (?, ?, ?, ?)", tuple(row))
    request_id = office.request(pseudonym)
    with pytest.raises(PersonErasedError):
        office.approve(request_id)


def test_an_erasure_while_a_pseudonym_is_made_leaves_no_way_back(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old pseudonym must not be stored, sealed under the key of the person's next life."""
    halves: Any = office.pseudonymiser._halves
    real = halves.encrypt
    erased: list[str] = []

    def erase_meanwhile(half: Half, **arguments: Any) -> str:
        if not erased:
            erased.append(office.pseudonymiser._compute(owner, "study-1")[1])
            office.bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        return str(real(half, **arguments))

    owner = office.bench.keyring.owner(TENANT, "ada")
    monkeypatch.setattr(halves, "encrypt", erase_meanwhile)
    made = office.pseudonym()
    assert made != erased[0]
    with pytest.raises(ApprovalError):
        office.request(erased[0])
    assert office.reveal(approved(office, made)) == "ada"


def test_a_process_that_has_not_heard_of_an_erasure_stores_no_way_back(
    office: Office, tmp_path: Path
) -> None:
    clock, server = office.bench.clock, office.bench.server
    with workbench(tmp_path / "keys.sqlite3", server=server, clock=clock) as theirs:
        office.bench.seal("ada")
        old = office.pseudonymiser._compute(office.bench.keyring.owner(TENANT, "ada"), "study-1")[1]
        theirs.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        made = office.pseudonym()  # with what is still in the cache, if it were let
        assert made != old
        assert office.reveal(approved(office, made)) == "ada"


def approved(office: Office, pseudonym: str) -> str:
    request_id = office.request(pseudonym)
    office.approve(request_id)
    return request_id


@pytest.mark.parametrize("meanwhile", ["approved", "erased"])
def test_an_approval_that_comes_too_late_says_so(
    office: Office, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    request_id = office.request()
    slow = FakeOfficer("carl", "second", office.anna.halves)
    happened: list[str] = []

    def decrypt(half: Half, *, context: bytes, ciphertext: str) -> bytes:
        if not happened:
            happened.append(meanwhile)
            if meanwhile == "approved":
                office.approve(request_id)
            else:
                office.bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        return office.bert.decrypt(half, context=context, ciphertext=ciphertext)

    monkeypatch.setattr(slow, "decrypt", decrypt)
    with pytest.raises(ApprovalError, match="meanwhile"):
        office.approve(request_id, slow)
    assert office.bench.recorder.events[-1].succeeded is False


def test_a_half_that_was_opened_and_not_used_does_not_stay(office: Office) -> None:
    approved(office, office.pseudonym())
    office.bench.clock.advance(REQUEST_LIFE_S)
    office.request()
    with office.bench.database.reading() as connection:
        [left] = connection.exec_driver_sql(
            "SELECT count(*) FROM reidentifications WHERE half_opened IS NOT NULL"
        ).one()
    assert left == 0


# --- On record ------------------------------------------------------------------------------------


def test_every_step_is_on_record_before_it_takes_effect(office: Office) -> None:
    pseudonym = office.pseudonym()
    request_id = office.request(pseudonym)
    office.approve(request_id)
    office.reveal(request_id)
    events = [
        (event.action.removeprefix("keys.pseudonym."), event.stage, event.actor)
        for event in office.bench.recorder.events
    ]
    assert events == [
        ("request", "intent", "anna"),
        ("request", "outcome", "anna"),
        ("approve", "intent", "bert"),
        ("approve", "outcome", "bert"),
        ("reveal", "intent", "anna"),
        ("reveal", "outcome", "anna"),
    ]
    assert all("ada" not in str(event.detail) for event in office.bench.recorder.events)


def test_refused_attempts_are_on_record_too(office: Office) -> None:
    request_id = office.request()
    with pytest.raises(ApprovalError):
        office.approve(request_id, office.anna)
    last = office.bench.recorder.events[-1]
    assert (last.action, last.succeeded) == ("keys.pseudonym.approve", False)
    assert last.detail["error"] == "keys.approval_refused"


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 4, 5])
def test_without_the_log_nothing_is_revealed(office: Office, fail_at: int) -> None:
    pseudonym = office.pseudonym()
    office.bench.recorder.fail_at = fail_at
    revealed: list[str] = []

    def attempt() -> None:
        request_id = office.request(pseudonym)
        office.approve(request_id)
        revealed.append(office.reveal(request_id))

    with pytest.raises(LogDownError):
        attempt()
    assert revealed == []


def test_a_failed_reveal_uses_the_request_up(office: Office) -> None:
    request_id = office.request()
    office.approve(request_id)
    office.bench.recorder.fail_at = len(office.bench.recorder.events) + 1
    with pytest.raises(LogDownError):
        office.reveal(request_id)
    office.bench.recorder.fail_at = None
    with pytest.raises(ApprovalError, match="used"):
        office.reveal(request_id)


# --- On a real key server -------------------------------------------------------------------------


def test_real_officers_open_one_half_each_and_the_gateway_none(
    tmp_path: Path, openbao: RunningServer, vault: Callable[[str], VaultClient]
) -> None:
    gateway = vault("gateway")
    with ExitStack() as stack:
        bench = stack.enter_context(workbench(tmp_path / "k", wrapper=TransitKeyWrapper(gateway)))
        officers: dict[str, VaultOfficer] = {}
        with openbao.embedded.administer() as administrator:
            halves: dict[str, Half] = {"anna": "first", "bert": "second", "carl": "first"}
            for name, half in halves.items():
                files = create_officer(administrator, name, half, tmp_path / "officers")
                client = openbao.embedded._client(name, files)
                officers[name] = VaultOfficer(stack.enter_context(client))
        assert officers["anna"].name() == "anna"
        office = Pseudonymiser(
            bench.keyring,
            database=bench.database,
            halves=VaultHalves(gateway),
            recorder=bench.recorder,
        )
        pseudonym = office.pseudonym(tenant=TENANT, purpose="study-1", person="ada")

        def request() -> str:
            return office.request(
                officers["anna"], tenant=TENANT, pseudonym=pseudonym, reason="patient-safety"
            )

        refused = request()
        with pytest.raises(ApprovalError):
            office.approve(officers["carl"], tenant=TENANT, request_id=refused)
        with pytest.raises(VaultDeniedError):
            VaultOfficer(gateway).name()
        with pytest.raises(VaultDeniedError):
            VaultOfficer(gateway).decrypt("first", context=b"c", ciphertext="vault:v1:AAAA")
        request_id = request()
        office.approve(officers["bert"], tenant=TENANT, request_id=request_id)
        revealed = office.reveal(officers["anna"], tenant=TENANT, request_id=request_id)
        assert revealed == "ada"
