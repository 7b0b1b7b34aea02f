"""`havengate audit`: what each command does, prints and exits with, and what it does not open."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from fhir.resources.R4B.auditevent import AuditEvent
from typer.testing import CliRunner

from audit.checkpoint import verifier_keys
from audit.cli import AuditCommands, AuditProgram, build
from audit.cli_views import exchange_line, print_headings
from audit.criteria import Criteria
from audit.entry import encode_entry, parse_entry
from audit.errors import (
    AuditConfigurationError,
    AuditError,
    MalformedNoteError,
    MalformedQueryError,
    VerificationError,
)
from audit.index import AuditIndex
from audit.log import LogWriter
from audit.note import VerifierKey
from audit.ports import PersonSealer
from audit.proof import parse_proof, verify_proof
from audit.publish import Publisher
from audit.reader import LogReader
from audit.recorder import End, Recorder
from audit.search import Search
from audit.settings import AuditSettings
from audit.tiles import bundle_path
from audit.witness import WitnessClient
from tests.audit.conftest import MemorySigner
from tests.audit.records import LocalSealer, Ticker, make_act, make_entry

ORIGIN = "log.example/cli"
EXCHANGES = 150


@dataclass
class Site:
    """A directory with a log, and a program root that counts what it opens."""

    directory: Path
    signer: MemorySigner = field(default_factory=MemorySigner)
    sealer: LocalSealer = field(default_factory=LocalSealer)
    opened: list[str] = field(default_factory=list)
    retention_days: int = 2192

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def key(self) -> str:
        return verifier_keys(ORIGIN, self.signer)[0].text

    @property
    def reader(self) -> LogReader:
        return LogReader(self.log)

    def settings(self) -> AuditSettings:
        self.opened.append("settings")
        return AuditSettings(
            origin=ORIGIN,
            directory=str(self.log),
            index_url=f"sqlite:///{self.directory}/index.sqlite3",
            retention_days=self.retention_days,
        )

    def keys(self) -> tuple[VerifierKey, ...]:
        self.opened.append("keys")
        return verifier_keys(ORIGIN, self.signer)

    @contextmanager
    def open_sealer(self) -> Iterator[PersonSealer]:
        self.opened.append("sealer")
        yield self.sealer

    @contextmanager
    def open_program(self) -> Iterator[AuditProgram]:
        self.opened.append("program")
        numbers = iter(range(10**6))
        with self.written() as writer:
            recorder = Recorder(
                writer,
                sealer=self.sealer,
                clock=Ticker(time.time() - 3600),
                ids=lambda: f"cli-{next(numbers)}-{os.urandom(4).hex()}",
            )
            yield AuditProgram(
                tenant="clinic-1",
                actor="Practitioner/officer",
                appender=writer,
                recorder=recorder,
                sealer=self.sealer,
            )

    @contextmanager
    def written(self) -> Iterator[LogWriter]:
        with (
            LogWriter.open(self.log, origin=ORIGIN) as writer,
            Publisher(writer, self.signer, interval_s=0.05).start() as publisher,
        ):
            yield writer
            publisher.publish()

    def run(self, *arguments: str) -> Result:
        self.opened.clear()
        commands = AuditCommands(
            settings=self.settings,
            tenant=lambda: "clinic-1",
            verifier_keys=self.keys,
            open_sealer=self.open_sealer,
            open_program=self.open_program,
        )
        root = typer.Typer()
        root.add_typer(build(commands), name="audit")
        return CliRunner().invoke(root, ["audit", *arguments])

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("site"))
    with made.open_program() as program:
        for n in range(EXCHANGES):
            end = End(outcome="success" if n % 10 else "denied", status=200)
            act = make_act(patients=("Patient/eve" if n % 50 == 7 else "Patient/bob",))
            program.recorder.outcome(program.recorder.intent(act), end)
    return made


@pytest.fixture
def site(original: Site, tmp_path: Path) -> Site:
    shutil.copytree(original.directory, tmp_path, dirs_exist_ok=True)
    return Site(tmp_path, signer=original.signer, sealer=copy.deepcopy(original.sealer))


def refused(result: Result) -> AuditError:
    assert isinstance(result.exception, AuditError)
    return result.exception


def test_verify_needs_nothing_but_a_copy_of_the_log_and_a_key(site: Site) -> None:
    found = site.json("verify", "--log", str(site.log), "--key", site.key)
    assert found["sound"] is True
    assert (found["size"], found["checked"], found["dangling_count"]) == (300, 300, 0)
    assert site.opened == []


def test_prove_needs_nothing_but_a_copy_of_the_log_and_a_key(site: Site) -> None:
    output = site.directory / "proof"
    found = site.json("prove", "17", "--log", str(site.log), "--key", site.key, "-o", str(output))
    assert found["size"] == 300
    assert site.opened == []
    proof = parse_proof(output.read_bytes())
    assert proof.extra == site.reader.entry(17)
    verify_proof(proof, site.reader.entry(17), verifier_keys(ORIGIN, site.signer))


def test_verify_proof_needs_nothing_but_the_file_and_a_key_and_shows_the_entry(site: Site) -> None:
    output = site.directory / "proof"
    site.json("prove", "17", "--key", site.key, "-o", str(output))
    shutil.rmtree(site.log)
    site.opened.clear()
    found = site.json("verify-proof", str(output), "--key", site.key)
    assert (found["index"], found["size"], found["origin"]) == (17, 300, ORIGIN)
    assert (
        found["entry"]["request"] in site.run("verify-proof", str(output), "--key", site.key).stdout
    )
    assert site.opened == []


@pytest.mark.parametrize("damage", ["entry", "index", "hash", "signature", "wrong key"])
def test_verify_proof_refuses_what_does_not_fit(site: Site, damage: str) -> None:
    key = site.key
    proof = parse_proof(site.run("prove", "17", "--key", key).stdout_bytes)
    assert proof.extra is not None
    match damage:
        case "entry":
            proof = replace(proof, extra=proof.extra.replace(b"clinic-1", b"clinic-2"))
        case "index":
            proof = replace(proof, index=18)
        case "hash":
            proof = replace(proof, hashes=(bytes(32), *proof.hashes[1:]))
        case "signature":
            at = proof.checkpoint.rindex(b" ") + 20
            flipped = b"A" if proof.checkpoint[at : at + 1] != b"A" else b"B"
            forged = proof.checkpoint[:at] + flipped + proof.checkpoint[at + 1 :]
            proof = replace(proof, checkpoint=forged)
        case _:
            key = verifier_keys(ORIGIN, MemorySigner())[0].text
    file = site.directory / "proof"
    file.write_bytes(proof.encode())
    result = site.run("verify-proof", str(file), "--key", key)
    assert isinstance(refused(result), MalformedNoteError | VerificationError)
    assert result.stdout == ""


def test_verify_proof_takes_the_entry_from_a_file_where_the_proof_does_not_hold_it(
    site: Site,
) -> None:
    proof = parse_proof(site.run("prove", "17", "--key", site.key).stdout_bytes)
    bare, entry = site.directory / "bare", site.directory / "entry"
    bare.write_bytes(replace(proof, extra=None).encode())
    entry.write_bytes(proof.extra or b"")
    told = refused(site.run("verify-proof", str(bare), "--key", site.key))
    assert "--entry" in str(told)
    found = site.json("verify-proof", str(bare), "--entry", str(entry), "--key", site.key)
    assert found["index"] == 17
    entry.write_bytes(site.reader.entry(18))
    refused(site.run("verify-proof", str(bare), "--entry", str(entry), "--key", site.key))


def test_verify_and_prove_ask_the_key_server_when_no_key_is_given(site: Site) -> None:
    assert site.run("verify").exit_code == 0
    assert site.opened == ["settings", "keys", "settings", "settings"]
    result = site.run("prove", "3")
    assert result.exit_code == 0
    assert result.stdout_bytes == parse_proof(result.stdout_bytes).encode()


@pytest.mark.parametrize("damage", ["entry", "checkpoint", "tile", "wrong key", "state"])
def test_verify_exits_with_one_and_names_what_is_wrong(site: Site, damage: str) -> None:
    key = site.key
    paths = {
        "entry": site.log / bundle_path(0),
        "checkpoint": site.log / "checkpoint",
        "tile": site.log / "tile/0/000",
        "state": site.log / "state",
    }
    if damage == "wrong key":
        key = verifier_keys(ORIGIN, MemorySigner())[0].text
    else:
        content = bytearray(paths[damage].read_bytes())
        content[len(content) // 2] ^= 1
        paths[damage].write_bytes(content)
    result = site.run("verify", "--log", str(site.log), "--key", key, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["sound"] is False
    assert found["problems"]
    told = site.run("verify", "--log", str(site.log), "--key", key)
    assert told.exit_code == 1
    assert "NOT SOUND" in told.stdout


def test_verify_lists_what_never_ended(site: Site) -> None:
    with site.open_program() as program:
        begun = program.recorder.intent(make_act())
    found = site.json("verify")
    assert found["dangling"] == [{"index": 300, "request": begun.request, "stage": "intent"}]
    assert "No outcome   entry 300" in site.run("verify").stdout


def test_verify_holds_the_log_against_an_older_checkpoint(site: Site) -> None:
    older = site.directory / "older"
    older.write_bytes((site.log / "checkpoint").read_bytes())
    with site.written() as writer:
        writer.append(encode_entry(make_entry("message", sequence=1)))
    assert site.json("verify", "--checkpoint", str(older))["consistent_with"] == 300
    (site.log / "checkpoint").write_bytes(older.read_bytes())
    rolled_back = site.run("verify", "--log", str(site.log), "--key", site.key)
    assert rolled_back.exit_code == 1
    assert "301 entries were published" in rolled_back.stdout


def test_keys_come_from_a_file_too(site: Site) -> None:
    keys = site.directory / "keys.txt"
    keys.write_text(f"# the log\n{site.key}\n\n")
    assert site.run("verify", "--log", str(site.log), "--key", str(keys)).exit_code == 0
    result = site.run("verify", "--log", str(site.log), "--key", "no-such-file")
    assert isinstance(refused(result), AuditConfigurationError)


@pytest.mark.parametrize("index", ["300", "999999"])
def test_prove_refuses_what_is_not_published(site: Site, index: str) -> None:
    assert isinstance(refused(site.run("prove", index, "--key", site.key)), MalformedQueryError)


def test_search_finds_persons_and_pages(site: Site) -> None:
    found = site.json("search", "--patient", "Patient/eve")
    assert len(found["exchanges"]) == 3
    assert site.opened.count("sealer") == 1
    assert "program" not in site.opened
    page = site.json("search", "--outcome", "denied", "--limit", "10")
    assert len(page["exchanges"]) == 10
    rest = site.json("search", "--outcome", "denied", "--before", str(page["before"]))
    assert len(rest["exchanges"]) == 5
    assert rest["before"] is None
    for exchange in page["exchanges"]:
        assert [entry["stage"] for entry in exchange["entries"]] == ["intent", "outcome"]
        for entry in exchange["entries"]:
            raw = site.reader.entry(entry.pop("log_index"))
            assert json.loads(raw) == {k: v for k, v in entry.items() if v not in (None, [], {})}


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["obs-1"], 50),
        (["--label", "PSY", "--rule", "treating-clinician"], 50),
        (["--since", "2030-01-01"], 0),
        (["--until", "2000-01-01T00:00"], 0),
        (["--action", "read", "--service", "ehr", "--decision", "allow"], 50),
        (["--tenant", "clinic-2"], 0),
        (["--person", "Practitioner/nobody"], 0),
    ],
)
def test_search_takes_every_question(site: Site, arguments: list[str], count: int) -> None:
    assert len(site.json("search", *arguments)["exchanges"]) == count
    assert site.run("search", *arguments).stdout.count("\n") == count


def test_search_shows_no_name_unless_asked_and_records_when_it_does(site: Site) -> None:
    for arguments in ([], ["--json"]):
        closed = site.run("search", *arguments)
        assert "/bob" not in closed.stdout
        assert "program" not in site.opened
    before = site.reader.size()
    shown = site.run("search", "--reveal", "--limit", "3").stdout
    assert shown.count("Practitioner/ada") == 3
    assert "Patient/bob" in shown
    recorded = [parse_entry(raw) for _, raw in site.reader.read(before)]
    assert [(e.stage, e.action, e.details) for e in recorded] == [
        ("intent", "search", {"names": "revealed"}),
        ("outcome", "search", {"names": "revealed"}),
    ]
    site.sealer.erase(tenant="clinic-1", person="Practitioner/ada")
    assert "«erased»" in site.run("search", "--reveal", "--limit", "9").stdout


def test_verified_search_proves_what_it_shows(site: Site) -> None:
    found = site.json("search", "--verified", "--key", site.key, "--limit", "5")
    assert found["verified"] is True
    wrong = verifier_keys(ORIGIN, MemorySigner())[0].text
    refused(site.run("search", "--verified", "--key", wrong))


@pytest.mark.parametrize("wrong", [["--since", "yesterday"], ["a'b"]])
def test_a_malformed_question_is_refused(site: Site, wrong: list[str]) -> None:
    assert isinstance(refused(site.run("search", *wrong)), MalformedQueryError)


@pytest.mark.parametrize("name", ["balp", "ocsf", "csv"])
def test_export_is_recorded_and_complete(site: Site, name: str) -> None:
    output = site.directory / f"out.{name}"
    found = site.json("export", "--format", name, "-o", str(output))
    content = output.read_bytes()
    assert found["bytes"] == len(content)
    assert content.count(b"\n") == EXCHANGES + (name == "csv")
    assert output.stat().st_mode & 0o777 == 0o600
    recorded = [parse_entry(raw) for _, raw in site.reader.read(300)]
    assert [(e.stage, e.action) for e in recorded] == [("intent", "export"), ("outcome", "export")]
    if name == "balp":
        for line in content.splitlines():
            AuditEvent.model_validate_json(line)
    again = site.run("export", "--format", name, "-o", str(output))
    assert isinstance(refused(again), AuditConfigurationError)
    assert output.read_bytes() == content


def test_export_goes_to_standard_output(site: Site) -> None:
    result = site.run("export", "--format", "csv", "--patient", "Patient/eve", "--reveal")
    assert result.exit_code == 0
    assert result.stdout.count("Patient/eve") == 3
    assert "/bob" not in result.stdout


@pytest.mark.parametrize("wrong", [["--format", "xml"], ["--format", "csv", "--json"], []])
def test_export_refuses_a_wrong_command_line(site: Site, wrong: list[str]) -> None:
    assert site.run("export", *wrong).exit_code == 2
    assert site.reader.size() == 300


def test_rebuild_index_needs_no_keys(site: Site) -> None:
    site.run("search")
    (site.directory / "index.sqlite3").write_bytes(b"damaged" * 1000)
    assert site.json("rebuild-index")["indexed"] == 300
    assert set(site.opened) == {"settings"}
    assert len(site.json("search")["exchanges"]) == 50


def test_prune_only_looks_unless_told_and_says_when_nothing_is_due(site: Site) -> None:
    assert site.json("prune")["prunable"] == 0
    assert "program" not in site.opened
    site.retention_days = 30
    refused(site.run("prune"))


def test_prune_removes_whole_bundles_and_the_rest_stays_sound(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.retention_days = 1
    # Two days after the newest entry.
    later = max(parse_entry(raw).time for _, raw in site.reader.read()) / 1e6 + 2 * 86_400
    monkeypatch.setattr("audit.cli.time.time", lambda: later)
    site.run("search")
    looked = site.json("prune", "--shorter-than-six-years")
    assert (looked["prunable"], looked["removed"]) == (256, 0)
    assert site.reader.entry(0)
    done = site.json("prune", "--shorter-than-six-years", "--yes")
    assert (done["removed"], done["retained_from"]) == (256, 256)
    checked = ("verify", "--log", str(site.log), "--key", site.key)
    # Six years, unless whoever verifies says that less was agreed on.
    assert site.run(*checked).exit_code == 1
    found = site.json(*checked, "--retention-days", "1")
    assert (found["sound"], found["retained_from"], found["checked"]) == (True, 256, 45)
    assert site.json("status")["first"] == 256
    assert len(site.json("search", "--action", "read")["exchanges"]) == 22
    site.json("rebuild-index")
    output = site.directory / "rest.csv"
    site.json("export", "--format", "csv", "-o", str(output))


def test_status_tells_sizes(site: Site) -> None:
    found = site.json("status")
    assert found == {"origin": ORIGIN, "size": 300, "published": 300, "first": 0, "indexed": 0}
    assert "Published    300" in site.run("status").stdout
    site.json("status", "--log", str(site.log))
    assert site.opened == []


def test_nothing_is_opened_before_a_command_runs(site: Site) -> None:
    for arguments in (["--help"], ["verify", "--help"], ["witness", "--help"]):
        assert site.run(*arguments).exit_code == 0
        assert site.opened == []


def test_search_has_headings_on_a_terminal_and_nowhere_else(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "outcome" not in site.run("search", "--limit", "3").stdout
    with AuditIndex(site.settings().index_url) as index:
        exchanges = Search(index, site.reader).page(Criteria(tenant="clinic-1"), limit=1)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_headings(exchanges.exchanges)
    heads = typer.unstyle(capsys.readouterr().out)
    line = exchange_line(exchanges.exchanges[0], None)
    assert heads.index("outcome") == line.index(exchanges.exchanges[0].newest.outcome or "")
    print_headings([])
    assert capsys.readouterr().out == ""


def test_there_is_no_progress_bar_but_on_a_terminal(site: Site) -> None:
    for arguments in (["verify"], ["search"], ["rebuild-index"]):
        told = site.run(*arguments).stderr
        assert told in {"", "More: --before 201\n"}


def test_witness_serves_and_cosigns(site: Site) -> None:
    code = (
        "import typer; from audit.cli import _add_witness; a = typer.Typer(); _add_witness(a); a()"
    )
    command = [sys.executable, "-c", code, "--name", "witness.example/1", "--log-key", site.key]
    command += ["--directory", str(site.directory / "witness"), "--listen", "127.0.0.1:0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        try:
            key = VerifierKey.parse(told["verifier_key"])
            client = WitnessClient(f"http://{told['listening']}", key=key)
            with (
                LogWriter.open(site.log, origin=ORIGIN) as writer,
                Publisher(writer, site.signer, witnesses=[client]) as publisher,
            ):
                writer.append(encode_entry(make_entry("message", sequence=1)))
                publisher.publish()
        finally:
            process.send_signal(signal.SIGTERM)
    arguments = ("verify", "--log", str(site.log), "--key", site.key)
    found = site.json(*arguments, "--witness-key", told["verifier_key"])
    assert found["cosigned_by"] == ["witness.example/1"]
