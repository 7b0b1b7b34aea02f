"""`make demo`: keys and audit log at work on synthetic patients.

A scripted morning: records are sealed and stored in an app that knows nothing of it, searched by a
sealed name, read, kept through a rotation of keys; one patient is erased; and the log proves all of
it. Patients come from the package `carebundle` (Apache-2.0) and are nobody.

It ends by itself; `--once` is accepted for scripts and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

# Run as a file, so that `make demo` needs nothing on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from carebundle import generate_bundle
from rich.console import Console
from rich.markup import escape

from audit.criteria import Criteria
from audit.index import AuditIndex
from audit.note import VerifierKey
from audit.proof import parse_proof, prove, verify_proof
from audit.reader import LogReader
from audit.recorder import Act, End, Recorder, Who
from audit.search import Search, reveal, with_persons
from audit.verify import verify_log
from examples.record_store import RecordStore, Resource
from havengate import wiring
from havengate.configuration import Configuration, load
from keys.blindindex import BlindIndex
from keys.cli import KeysProgram
from keys.errors import PersonErasedError
from keys.keyring import Keyring
from keys.model import FieldContext

PATIENTS = 12
SERVICE = "ehr"
THERAPIST = Who(kind="person", person="Practitioner/adler", role="clinician", address="192.0.2.17")

console = Console(highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clinic:
    """Everything the demo works with."""

    settings: Configuration
    keyring: Keyring
    index: BlindIndex
    recorder: Recorder
    program: KeysProgram
    publish: Callable[[], object]
    verifier_keys: tuple[VerifierKey, ...]
    app: RecordStore


def main() -> None:
    """Run the demo from the first key to the last proof."""
    parser = argparse.ArgumentParser(description="Keys and audit log at work.")
    parser.add_argument("--once", action="store_true", help="accepted; the demo ends by itself")
    parser.parse_args()
    started_at = time.monotonic()
    settings = load(None, os.environ)
    console.print("[bold]Havengate[/]: sealed records and a log that proves what happened\n")
    with ExitStack() as stack:
        with console.status("starting the key server on this machine …"):
            clinic = open_clinic(settings, stack)
        say("key server", f"{clinic.program.server.address}, keys never leave it unwrapped")
        references = store_patients(clinic)
        show_disk(clinic, references)
        search(clinic, references[0])
        rotate(clinic, references)
        erased = references[-1]
        erase(clinic, erased)
        clinic.publish()
        verify(clinic)
        who_saw(clinic, references[0], erased)
    console.print(f"\nDone in {time.monotonic() - started_at:.0f} s. Now try:")
    for command in ("keys status", "keys check", "audit verify", "audit search", "--help"):
        console.print(f"  .venv/bin/havengate {command}")


def open_clinic(settings: Configuration, stack: ExitStack) -> Clinic:
    """Open keys, log and app."""
    opened = stack.enter_context(wiring.open_program(settings, os.environ))
    app = RecordStore(Path("var/demo/app.sqlite3"))
    stack.callback(app.close)
    return Clinic(
        settings=settings,
        keyring=opened.keys.keyring,
        index=opened.blind_index,
        recorder=opened.recorder,
        program=opened.commands,
        publish=opened.log.publish,
        verifier_keys=opened.verifier_keys,
        app=app,
    )


# --- Storing --------------------------------------------------------------------------------------


def store_patients(clinic: Clinic) -> list[str]:
    """Seal and store synthetic patients and their observations; return the patients' references."""
    references: list[str] = []
    sealed_fields = 0
    began_at = time.perf_counter()
    with console.status("sealing synthetic patients …"):
        for seed in range(PATIENTS):
            bundle = generate_bundle(profile="type2_diabetes", seed=seed)
            resources = [
                entry["resource"]
                for entry in bundle.model_dump(mode="json", by_alias=True, exclude_none=True)[
                    "entry"
                ]
            ]
            patient = f"Patient/demo-{seed}"
            references.append(patient)
            sealed_fields += store_bundle(clinic, patient, resources)
    took_ms = (time.perf_counter() - began_at) * 1000
    say(
        "stored",
        f"{PATIENTS} patients, {sealed_fields} fields sealed under {PATIENTS} keys, "
        f"every write in the log first ({took_ms:,.0f} ms)",
    )
    return references


def store_bundle(clinic: Clinic, patient: str, resources: list[Resource]) -> int:
    """Store one patient's resources as one exchange: intent, effect, outcome."""
    rows: list[tuple[str, str | None, Resource]] = []
    fields = 0
    kept = [r for r in resources if r["resourceType"] in {"Patient", "Condition", "Observation"}]
    begun = clinic.recorder.intent(
        Act(
            tenant=clinic.settings.tenant,
            who=THERAPIST,
            action="create",
            service=SERVICE,
            purpose="TREAT",
            resources=tuple(sorted({r["resourceType"] for r in kept})),
            patients=(patient,),
            decision="allow",
        )
    )
    for number, resource in enumerate(kept):
        kind = resource["resourceType"]
        reference = patient if kind == "Patient" else f"{kind}/{patient[8:]}-{number}"
        family = None
        if kind == "Patient":
            family = clinic.index.token_for_write(
                tenant=clinic.settings.tenant,
                service=SERVICE,
                field="Patient.name.family",
                value=normalised(resource["name"][0]["family"]),
            )
        fields += seal_resource(clinic, patient, resource)
        rows.append((reference, family, resource))
    clinic.app.put_all(rows)
    clinic.recorder.outcome(
        begun, End(outcome="success", status=201, counts={"resources": len(rows)})
    )
    return fields


#: What the demo protects. The narrative repeats the content in prose, so it is sealed too.
PROTECTED = {
    "Patient": ("name", "birthDate", "identifier", "text"),
    "Condition": ("code", "text"),
    "Observation": ("valueQuantity", "component", "text"),
}


def seal_resource(clinic: Clinic, patient: str, resource: Resource) -> int:
    """Replace protected elements by sealed text, each bound to its place; return how many."""
    sealed = 0
    for element in PROTECTED[resource["resourceType"]]:
        if element in resource:
            context = field_context(clinic, patient, resource["resourceType"], element)
            plaintext = json.dumps(resource[element]).encode()
            resource[element] = clinic.keyring.seal(context, plaintext)
            sealed += 1
    return sealed


def field_context(clinic: Clinic, patient: str, kind: str, element: str) -> FieldContext:
    """Where a sealed text belongs, and opens."""
    return FieldContext(
        tenant=clinic.settings.tenant,
        person=patient,
        service=SERVICE,
        field=f"{kind}.{element}",
    )


def normalised(name: str) -> bytes:
    """How names are compared."""
    return name.strip().casefold().encode()


# --- Using ----------------------------------------------------------------------------------------


def show_disk(clinic: Clinic, references: list[str]) -> None:
    """Show one record as the app's database holds it, and look for anything readable."""
    stored = clinic.app.get(references[0])
    say("on its disk", f"name: {stored['name'][:58]}…")
    name = open_name(clinic, references[0])
    family = name.split()[-1]
    found = sum(family in body for body in clinic.app.bodies())
    say("", f"the name “{escape(family)}” occurs {found} times in the app's database")


def open_name(clinic: Clinic, patient: str) -> str:
    """Read a patient's name as the therapist: intent, unseal, outcome."""
    begun = clinic.recorder.intent(
        Act(
            tenant=clinic.settings.tenant,
            who=THERAPIST,
            action="read",
            service=SERVICE,
            purpose="TREAT",
            resources=(patient,),
            decision="allow",
        )
    )
    try:
        context = field_context(clinic, patient, "Patient", "name")
        name = json.loads(clinic.keyring.unseal(context, clinic.app.get(patient)["name"]))[0]
    except PersonErasedError:
        clinic.recorder.outcome(begun, End(outcome="failed", reason="person-erased"))
        raise
    clinic.recorder.outcome(begun, End(outcome="success", status=200, counts={"resources": 1}))
    return f"{name['given'][0]} {name['family']}"


def search(clinic: Clinic, patient: str) -> None:
    """Find a patient by a name that the app cannot read."""
    family = open_name(clinic, patient).split()[-1]
    tokens = clinic.index.tokens_for_search(
        tenant=clinic.settings.tenant,
        service=SERVICE,
        field="Patient.name.family",
        value=normalised(family),
    )
    found = clinic.app.find_by_family(tokens)
    say("searched", f"family = “{escape(family)}” → {', '.join(found)}")
    say("", f"what the app saw: {tokens[0]}")


def rotate(clinic: Clinic, references: list[str]) -> None:
    """Begin a new epoch; everything still opens."""
    report = clinic.program.keeper.rotate(actor=clinic.program.actor)
    for reference in references:
        open_name(clinic, reference)
    say(
        "rotated",
        f"epoch {report.epoch}, {report.rewrapped} keys rewrapped inside the key server; "
        f"all {len(references)} records still open",
    )


def erase(clinic: Clinic, patient: str) -> None:
    """Erase one patient, and try to read them."""
    receipt = clinic.program.eraser.erase(
        tenant=clinic.settings.tenant, person=patient, actor=clinic.program.actor
    )
    say(
        "erased",
        f"{patient}: {len(receipt.key_ids)} key destroyed, log entry {receipt.log_index}; "
        f"every backup dead by {receipt.backups_dead_by}",
    )
    try:
        open_name(clinic, patient)
    except PersonErasedError as error:
        say("", f"reading them now: {error.code}")
    else:
        raise SystemExit("The erased patient's record opened. This must never happen.")


# --- Proving --------------------------------------------------------------------------------------


def verify(clinic: Clinic) -> None:
    """Verify the whole log and one proof."""
    directory = Path(clinic.settings.audit.directory)
    report = verify_log(directory, clinic.verifier_keys)
    say(
        "verified",
        f"{report.checked} entries, tree, checkpoint and signature of {report.origin}; "
        f"{len(report.story.dangling)} intents without outcome",
    )
    reader = LogReader(directory)
    index = report.size - 1
    entry = reader.entry(index)
    checkpoint = (directory / "checkpoint").read_bytes()
    proof = prove(directory, index, checkpoint=checkpoint, size=report.size, entry=entry)
    path = Path("var/demo/last-entry.tlog-proof")
    path.write_bytes(proof.encode())
    verify_proof(parse_proof(path.read_bytes()), entry, clinic.verifier_keys)
    say("", f"proof of entry {index}: {path}, {len(proof.hashes)} hashes")


def who_saw(clinic: Clinic, patient: str, erased: str) -> None:
    """Answer “who saw this record?”, for a patient who is there and for one who was erased."""
    reader = LogReader(Path(clinic.settings.audit.directory))
    with AuditIndex(clinic.settings.audit.index_url) as index:
        index.refresh(reader)
        asked = Search(index, reader)
        for line in lines_about(clinic, asked, patient):
            say("who saw", line)
        left = len(list(lines_about(clinic, asked, erased)))
        say("", f"entries that can be traced to {erased}: {left}, the failed read just now")


def lines_about(clinic: Clinic, asked: Search, patient: str) -> Iterator[str]:
    """The last three exchanges that touched a patient, in words."""
    criteria = with_persons(
        Criteria(tenant=clinic.settings.tenant), clinic.keyring, actor=None, patient=patient
    )
    for exchange in asked.page(criteria, limit=3).exchanges:
        entry = exchange.newest
        names = reveal(entry, clinic.keyring)
        yield (
            f"{patient}: {names.actor} ({entry.actor.role}) {entry.action} for "
            f"{entry.purpose}, {entry.outcome}, entry {exchange.log_index}"
        )


def say(what: str, text: str) -> None:
    """One line of the story."""
    console.print(f"  [bold]{what:<12}[/] {text}", soft_wrap=True)


if __name__ == "__main__":
    main()
