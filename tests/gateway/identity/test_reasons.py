"""Reasons of emergencies end with the patient's key, in every copy of the directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.errors import UnavailableError
from gateway.identity.records import Account, open_break_glass
from gateway.identity.session_store import token_hash
from gateway.identity.shared_secret import SharedSecret
from gateway.identity.wiring import REASONS_SECRET
from gateway.protection import PersonSeals
from keys.errors import VaultUnavailableError
from tests.gateway.identity.workbench import Bench, bench
from tests.keys.workbench import TENANT, Workbench, workbench

REASON = "overdose of somebody"


@dataclass
class Clinic:
    """A directory whose reasons are sealed under real keys."""

    one: Bench
    keys: Workbench
    account: Account

    def open(self, patient: str) -> str:
        grants = self.one.identity.directory.grants
        return grants.open(self.account.id, patient=patient, reason=REASON, duration_s=60).id

    def reasons(self) -> dict[str, str]:
        found = self.one.identity.directory.grants.of(self.account.id)
        return {one.patient: one.reason for one in found}

    def sealed(self) -> list[str]:
        with self.one.identity.directory.database.reading() as connection:
            return [str(row.reason) for row in connection.exec_driver_sql("SELECT * FROM grants")]

    def write(self, reason: str, patient: str) -> None:
        with self.one.identity.directory.database.writing() as connection:
            connection.exec_driver_sql(
                "UPDATE grants SET reason = ? WHERE patient = ?", (reason, patient)
            )


@pytest.fixture
def clinic(tmp_path: Path) -> Iterator[Clinic]:
    with workbench(tmp_path / "keys.sqlite3") as keys:
        one = bench(tmp_path, persons=PersonSeals(tenant=TENANT, keyring=keys.keyring))
        yield Clinic(one, keys, one.clinician())
        one.identity.close()


def test_erasing_a_patient_destroys_the_reasons_written_about_him_and_no_others(
    clinic: Clinic,
) -> None:
    clinic.open("3")
    clinic.open("4")
    backup = clinic.sealed()
    assert clinic.reasons() == {"3": REASON, "4": REASON}
    clinic.keys.eraser.erase(tenant=TENANT, person="Patient/3", actor="officer")
    assert clinic.reasons() == {"3": "", "4": REASON}
    # What an older copy of the directory holds is the same text, and opens no more than it.
    clinic.write(backup[0], "3")
    assert clinic.reasons()["3"] == ""
    # A new one has a new key, which does not bring the old one back.
    clinic.one.clock.now += 61
    clinic.open("3")
    assert clinic.reasons() == {"3": REASON}


def test_an_emergency_whose_reason_is_gone_has_none_for_the_rules(clinic: Clinic) -> None:
    clinic.open("3")
    token = clinic.one.session(clinic.account)
    clinic.keys.eraser.erase(tenant=TENANT, person="Patient/3", actor="officer")
    view = clinic.one.identity.directory.sessions.load(token_hash(token))
    assert view is not None
    glass = open_break_glass(view.grants, clinic.one.clock())
    assert glass is not None
    assert len(glass.reason) == 0


def test_a_reason_that_an_earlier_version_wrote_is_still_read(clinic: Clinic) -> None:
    grant = clinic.open("3")
    directory = clinic.one.identity.directory
    before = SharedSecret.open(clinic.one.store, REASONS_SECRET, directory.database)
    clinic.write(before.seal("reason", "wrote it long ago", grant, clinic.account.id, "3"), "3")
    assert clinic.reasons() == {"3": "wrote it long ago"}


def test_a_reason_moved_to_another_patient_or_grant_is_none(clinic: Clinic) -> None:
    clinic.open("3")
    clinic.open("4")
    clinic.write(clinic.sealed()[0], "4")
    assert clinic.reasons() == {"3": REASON, "4": ""}
    with clinic.one.identity.directory.database.writing() as connection:
        connection.exec_driver_sql("UPDATE grants SET patient = '5' WHERE patient = '3'")
    assert clinic.reasons()["5"] == ""


def test_without_keys_no_emergency_begins_and_reasons_are_unread(clinic: Clinic) -> None:
    clinic.open("3")
    clinic.keys.store.empty()
    clinic.keys.server.available = False
    with pytest.raises(VaultUnavailableError):
        clinic.open("4")
    assert clinic.reasons() == {"3": ""}


def test_a_reason_is_read_again_once_keys_are_back(clinic: Clinic) -> None:
    clinic.open("3")
    hashed = token_hash(clinic.one.session(clinic.account))
    sessions = clinic.one.identity.directory.sessions
    sessions.kept(hashed)
    clinic.keys.store.empty()
    clinic.keys.server.available = False
    sessions.load(hashed)
    assert sessions.kept(hashed) is None
    clinic.keys.server.available = True
    sessions.load(hashed)
    kept = sessions.kept(hashed)
    assert kept is not None
    assert [one.reason for one in kept.grants] == [REASON]


def test_without_anything_to_seal_with_no_emergency_begins(clinic: Clinic) -> None:
    clinic.one.identity.directory.grants._reasons = None
    with pytest.raises(UnavailableError):
        clinic.open("3")
