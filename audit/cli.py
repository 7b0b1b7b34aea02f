"""`havengate audit`: verify, prove, search, export, rebuild-index, prune, status, witness.

The commands only ask and print. The program root calls `build` with an `AuditCommands`, whose
functions open things when a command needs them: `verify` and `prove` with `--log` and `--key` read
no configuration and open no key server, so they work on any machine that holds a copy of the log.
Errors pass through to the root, which prints them. Exit codes: 0 done, 1 a problem was found or the
command was refused, 2 wrong command line or configuration, 3 something is not available.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from audit.cli_views import (
    exchange_line,
    page_object,
    print_report,
    report_object,
)
from audit.criteria import Criteria, parse_words
from audit.errors import AuditConfigurationError, LogTamperedError, MalformedQueryError
from audit.export import FORMATS, Export, run_export
from audit.export.csv import rfc3339
from audit.index import AuditIndex
from audit.note import VerifierKey
from audit.proof import prove as make_proof
from audit.reader import LogReader
from audit.recorder import Act, End, Who
from audit.recovery import read_checkpoint
from audit.retention import first_kept, plan_prune, prune, retained_from
from audit.search import Search, reveal, verify_entries, with_persons
from audit.verify import examine_log
from audit.witness import LocalSigner, Witness, WitnessServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from audit.ports import PersonSealer
    from audit.recorder import Appender, Recorder
    from audit.search import Exchange, Names
    from audit.settings import AuditSettings

PROBLEM_FOUND = 1

JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LogOption = Annotated[
    Path | None, typer.Option("--log", help="The log's directory. Default: the configured one.")
]
KeyOption = Annotated[
    list[str] | None,
    typer.Option("--key", help="Verifier key of the log, or a file of such, one a line."),
]
TenantOption = Annotated[str | None, typer.Option(help="Default: the configured one.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditProgram:
    """What a command works with that writes into the log. `actor` is who runs it."""

    tenant: str
    actor: str
    appender: Appender
    recorder: Recorder
    sealer: PersonSealer


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCommands:
    """How the commands get what they work with; nothing is called before a command needs it.

    `settings` and `tenant` read the configuration. `verifier_keys` asks the key server for the
    log's own public keys. `open_sealer` opens what finds and opens names, and not the log.
    `open_program` opens everything, the log for writing included, and publishes what was appended
    while it is open.
    """

    settings: Callable[[], AuditSettings]
    tenant: Callable[[], str]
    verifier_keys: Callable[[], Sequence[VerifierKey]]
    open_sealer: Callable[[], AbstractContextManager[PersonSealer]]
    open_program: Callable[[], AbstractContextManager[AuditProgram]]


def build(commands: AuditCommands) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `audit`."""
    app = typer.Typer(no_args_is_help=True, help="The log: verify, prove, search, export it.")
    _add_verify(app, commands)
    _add_prove(app, commands)
    _add_search(app, commands)
    _add_export(app, commands)
    _add_rebuild(app, commands)
    _add_prune(app, commands)
    _add_status(app, commands)
    _add_key(app, commands)
    _add_witness(app)
    return app


def _add_verify(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command()
    def verify(
        *,
        log: LogOption = None,
        key: KeyOption = None,
        witness_key: Annotated[
            list[str] | None, typer.Option(help="Verifier key of a witness, or a file of such.")
        ] = None,
        checkpoint: Annotated[
            Path | None, typer.Option(help="An older checkpoint that you kept: must be continued.")
        ] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Prove every entry, tile and signature; list what was announced and never ended.

        Exits with 1 if anything does not fit. With --log and --key it needs no key server.
        """
        directory = _directory(commands, log)
        keys = _keys(commands, key)
        witnesses = _parse_keys(witness_key or [])
        if witness_key is None and log is None:
            configured = commands.settings().witnesses
            witnesses = [VerifierKey.parse(one.verifier_key) for one in configured]
        older = None if checkpoint is None else _read(checkpoint)
        try:
            kept = retained_from(LogReader(directory))
        except LogTamperedError:
            # The examination says what is wrong; without a readable state nothing was pruned.
            kept = 0
        with _progress("entries") as told:
            report = examine_log(
                directory,
                keys,
                witness_keys=witnesses,
                older_checkpoint=older,
                retained_from=kept,
                progress=told,
            )
        if as_json:
            _print_json(report_object(report, kept))
        else:
            print_report(report, kept)
        if report.problem_count:
            raise typer.Exit(PROBLEM_FOUND)


def _add_prove(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command()
    def prove(
        index: Annotated[int, typer.Argument(min=0, help="Index of the entry in the log.")],
        *,
        output: Annotated[
            Path | None, typer.Option("-o", "--output", help="File. Default: standard output.")
        ] = None,
        log: LogOption = None,
        key: KeyOption = None,
        as_json: JSONOption = False,
    ) -> None:
        """Make a proof file (c2sp.org/tlog-proof) that an entry is in the log; it holds the entry.

        The proof is checked before it is given out. With --log and --key it needs no key server.
        """
        directory = _directory(commands, log)
        entry, published = _published(directory, index)
        signed = verify_entries(directory, published, _keys(commands, key), {index: entry})
        size = signed.checkpoint.size
        proof = make_proof(directory, index, checkpoint=published, size=size, entry=entry).encode()
        if output is not None:
            _write(output, proof)
        if as_json:
            found = {"index": index, "size": size, "origin": signed.checkpoint.origin}
            where = {"file": str(output)} if output else {"proof": proof.decode()}
            _print_json(found | where)
        elif output is None:
            sys.stdout.buffer.write(proof)
        else:
            typer.echo(f"Entry {index} is in {signed.checkpoint.origin} of {size}: {output}")


def _add_search(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command()
    def search(
        words: Annotated[
            list[str] | None, typer.Argument(help="Words; part2* for any ending.")
        ] = None,
        *,
        person: Annotated[str | None, typer.Option(help="Who acted: Practitioner/7.")] = None,
        patient: Annotated[str | None, typer.Option(help="Whose record: Patient/123.")] = None,
        since: Annotated[str | None, typer.Option(help="2027-01-31 or with a time; UTC.")] = None,
        until: Annotated[str | None, typer.Option(help="Exclusive.")] = None,
        rule: Annotated[str | None, typer.Option()] = None,
        label: Annotated[str | None, typer.Option()] = None,
        outcome: Annotated[str | None, typer.Option()] = None,
        decision: Annotated[str | None, typer.Option()] = None,
        action: Annotated[str | None, typer.Option()] = None,
        service: Annotated[str | None, typer.Option()] = None,
        request: Annotated[str | None, typer.Option()] = None,
        tenant: TenantOption = None,
        limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
        before: Annotated[int | None, typer.Option(help="Continue below this index.")] = None,
        show_names: Annotated[
            bool, typer.Option("--reveal", help="Open sealed names. This is recorded.")
        ] = False,
        verified: Annotated[
            bool, typer.Option("--verified", help="Prove each entry shown.")
        ] = False,
        key: KeyOption = None,
        as_json: JSONOption = False,
    ) -> None:
        """Search by person, patient, time, rule, label, outcome and more; newest first."""
        asked = Criteria(
            tenant=tenant or commands.tenant(),
            since_us=_parse_time(since),
            until_us=_parse_time(until),
            rule=rule,
            label=label,
            outcome=outcome,
            decision=decision,
            action=action,
            service=service,
            request=request,
            words=parse_words(" ".join(words or [])),
        )
        if person is not None or patient is not None:
            with commands.open_sealer() as sealer:
                asked = with_persons(asked, sealer, actor=person, patient=patient)
        directory = Path(commands.settings().directory)
        log = LogReader(directory)
        with AuditIndex(commands.settings().index_url) as index:
            _refresh(index, log)
            page = Search(index, log).page(asked, limit=limit, before=before)
        if verified:
            _verify(directory, log, _keys(commands, key), page.exchanges)
        names = _reveal(commands, page.exchanges) if show_names else [None] * len(page.exchanges)
        if as_json:
            _print_json(page_object(page, names, verified=verified))
            return
        for exchange, opened in zip(page.exchanges, names, strict=True):
            typer.echo(exchange_line(exchange, opened))
        if page.before is not None:
            typer.echo(f"More: --before {page.before}", err=True)


def _add_export(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command()
    def export(
        *,
        format_name: Annotated[str, typer.Option("--format", help="balp, ocsf or csv.")],
        output: Annotated[
            Path | None, typer.Option("-o", "--output", help="File. Default: standard output.")
        ] = None,
        since: Annotated[str | None, typer.Option(help="2027-01-31 or with a time; UTC.")] = None,
        until: Annotated[str | None, typer.Option(help="Exclusive.")] = None,
        patient: Annotated[str | None, typer.Option(help="Whose record: Patient/123.")] = None,
        tenant: TenantOption = None,
        show_names: Annotated[
            bool, typer.Option("--reveal", help="Open sealed names. This is recorded.")
        ] = False,
        as_json: JSONOption = False,
    ) -> None:
        """Export exchanges for other programs. The export itself is recorded first."""
        if format_name not in FORMATS:
            raise typer.BadParameter(f"one of {', '.join(FORMATS)}", param_hint="--format")
        if as_json and output is None:
            raise typer.BadParameter("needs --output: the export takes standard output")
        log = LogReader(Path(commands.settings().directory))
        with commands.open_program() as program:
            asked = Criteria(
                tenant=tenant or program.tenant,
                since_us=_parse_time(since),
                until_us=_parse_time(until),
            )
            wanted = Export(
                format=FORMATS[format_name],
                criteria=with_persons(asked, program.sealer, actor=None, patient=patient),
                tenant=program.tenant,
                who=Who(kind="person", person=program.actor),
                first=first_kept(log.directory),
                sealer=program.sealer if show_names else None,
            )
            with (
                _sink(output) as write,
                _progress("entries") as told,
                # If the reader goes away, the outcome is recorded while the log is still open.
                closing(run_export(wanted, log, program.recorder, progress=told)) as lines,
            ):
                size = sum(write(line) for line in lines)
        if as_json:
            _print_json({"file": str(output), "bytes": size, "format": format_name})


def _add_rebuild(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command("rebuild-index")
    def rebuild_index(*, as_json: JSONOption = False) -> None:
        """Throw the search index away and make it anew from the log. Needs no key server."""
        settings = commands.settings()
        log = LogReader(Path(settings.directory))
        begun = time.monotonic()
        with AuditIndex.anew(settings.index_url) as index:
            done = _refresh(index, log)
        elapsed_s = time.monotonic() - begun
        if as_json:
            _print_json({"indexed": done, "elapsed_s": round(elapsed_s, 3)})
        else:
            typer.echo(f"Indexed {done} entries in {elapsed_s:.1f} s.")


def _add_prune(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command("prune")
    def prune_command(
        *,
        yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only look.")] = False,
        shorter: Annotated[
            bool, typer.Option("--shorter-than-six-years", help="Keep less than HIPAA asks for.")
        ] = False,
        silence: Annotated[
            list[int] | None, typer.Option(help="Index of an entry after which it was quiet.")
        ] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Remove entries older than the policy; the rest stays provable. Only looks, at first."""
        settings = commands.settings()
        log = LogReader(Path(settings.directory))
        now_s = time.time()
        plan = plan_prune(
            log,
            retention_days=settings.retention_days,
            now_s=now_s,
            shorter=shorter,
            silences=frozenset(silence or ()),
        )
        removed = 0
        if yes and plan.count:
            with commands.open_program() as program:
                removed = prune(plan, log, program.appender, now_s=now_s)
            with AuditIndex(settings.index_url) as index:
                index.forget(plan.retained_from)
        found = {
            "retained_from": plan.retained_from,
            "prunable": plan.count,
            "cutoff": rfc3339(max(0, plan.cutoff_us)),
            "removed": removed,
            "resumed": plan.mark is not None,
        }
        if as_json:
            _print_json(found)
        elif removed:
            typer.echo(f"Removed {removed} entries; the log begins at {plan.retained_from}.")
        elif plan.count:
            typer.echo(f"{plan.count} entries are older than {found['cutoff']}. Do it: --yes")
        else:
            typer.echo(f"No whole bundle is older than {found['cutoff']}.")


def _add_status(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command()
    def status(*, log: LogOption = None, as_json: JSONOption = False) -> None:
        """Say how large the log is, how far it is published and indexed. Proves nothing."""
        reader = LogReader(_directory(commands, log))
        found: dict[str, Any] = {
            "origin": reader.origin,
            "size": reader.size(),
            "published": reader.published_size(),
            "first": first_kept(reader.directory),
        }
        if log is None:
            with AuditIndex(commands.settings().index_url) as index:
                found["indexed"] = index.position()
        if as_json:
            _print_json(found)
            return
        for name, value in found.items():
            typer.echo(f"{name.capitalize():<12} {value}")


def _add_key(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command("key")
    def key_command(*, as_json: JSONOption = False) -> None:
        """Print the log's verifier keys, as the key server knows them: for those who verify."""
        texts = [key.text for key in commands.verifier_keys()]
        if as_json:
            _print_json({"verifier_keys": texts})
            return
        for text in texts:
            typer.echo(text)


def _add_witness(app: typer.Typer) -> None:
    @app.command("witness")
    def witness(
        *,
        name: Annotated[str, typer.Option(help="Name of this witness: witness.example/1.")],
        log_key: Annotated[list[str], typer.Option(help="Verifier keys of the logs, or files.")],
        directory: Annotated[Path, typer.Option(help="Its key and what it saw.")] = Path(
            "var/witness"
        ),
        listen: Annotated[str, typer.Option(help="Address and port.")] = "127.0.0.1:8390",
        as_json: JSONOption = False,
    ) -> None:
        """Run a witness (c2sp.org/tlog-witness): remember logs' sizes and cosign what continues."""
        logs: dict[str, list[VerifierKey]] = {}
        for one in _parse_keys(log_key):
            logs.setdefault(one.name, []).append(one)
        signer = LocalSigner.load_or_create(directory / "key")
        made = Witness(directory, name=name, signer=signer, logs=logs)
        host, _, port = listen.rpartition(":")
        if not port.isdigit():
            raise typer.BadParameter("address:port", param_hint="--listen")
        with WitnessServer((host.strip("[]"), int(port)), made) as server:
            (key,) = [one.text for one in made.verifier_keys()]
            address = "{}:{}".format(*server.server_address[:2])
            if as_json:
                _print_json({"verifier_key": key, "listening": address})
            else:
                typer.echo(f"Verifier key {key}\nListening on {address}")
            sys.stdout.flush()
            server.serve_forever()


# --- What commands share --------------------------------------------------------------------------


def _directory(commands: AuditCommands, log: Path | None) -> Path:
    return Path(commands.settings().directory) if log is None else log


def _keys(commands: AuditCommands, given: list[str] | None) -> Sequence[VerifierKey]:
    return _parse_keys(given) if given else commands.verifier_keys()


def _parse_keys(given: Sequence[str]) -> list[VerifierKey]:
    """Read verifier keys: the text itself, or a file with one a line (# begins a comment)."""
    keys: list[VerifierKey] = []
    for text in given:
        path = Path(text)
        lines = [text] if "+" in text and not path.is_file() else _read(path).decode().splitlines()
        keys += [VerifierKey.parse(line) for line in lines if line.strip() and line[0] != "#"]
    return keys


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuditConfigurationError(f"{path} cannot be read: {error.strerror}.") from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise AuditConfigurationError(f"{path} cannot be written: {error.strerror}.") from error


def _published(directory: Path, index: int) -> tuple[bytes, bytes]:
    """Return an entry, and the published checkpoint. Exits by `MalformedQueryError`."""
    reader = LogReader(directory)
    found = read_checkpoint(directory)
    if found is None or index >= found[1].size:
        size = 0 if found is None else found[1].size
        raise MalformedQueryError(
            f"Entry {index} is not published; the checkpoint covers {size} entries."
        )
    return reader.entry(index), found[0]


def _parse_time(text: str | None) -> int | None:
    """Read an ISO 8601 time as Unix microseconds; without a zone it is UTC."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise MalformedQueryError(
            f"{text!r} is not a time: write 2027-01-31 or 2027-01-31T08:00+00:00."
        ) from error
    zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(zoned.timestamp() * 1_000_000)


def _refresh(index: AuditIndex, log: LogReader) -> int:
    with _progress("indexed") as told:
        size = log.size()
        done = index.refresh(
            log, first=first_kept(log.directory), progress=lambda position: told(position, size)
        )
    return done.added


def _verify(
    directory: Path, log: LogReader, keys: Sequence[VerifierKey], shown: Sequence[Exchange]
) -> None:
    found = read_checkpoint(directory)
    indices = [index for exchange in shown for index in exchange.indices]
    entries = {index: log.entry(index) for index in indices}
    verify_entries(directory, b"" if found is None else found[0], keys, entries)


def _reveal(commands: AuditCommands, shown: Sequence[Exchange]) -> list[Names]:
    """Open the names on a page, and record that before they are shown."""
    with commands.open_program() as program:
        begun = program.recorder.intent(
            Act(
                tenant=program.tenant,
                who=Who(kind="person", person=program.actor),
                action="search",
                service="audit",
                details={"names": "revealed"},
                counts={"exchanges": len(shown)},
            )
        )
        names = [reveal(exchange.newest, program.sealer) for exchange in shown]
        program.recorder.outcome(begun, End(outcome="success"))
    return names


@contextmanager
def _sink(output: Path | None) -> Iterator[Callable[[bytes], int]]:
    """Where an export goes; a new file is readable by its owner only."""
    if output is None:
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    try:
        output.touch(mode=0o600, exist_ok=False)
        with output.open("wb") as file:
            yield file.write
    except OSError as error:
        raise AuditConfigurationError(
            f"{output} cannot be written: {error.strerror}. Name a new file."
        ) from error


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(f"{{task.completed:,.0f}} {what}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found, ensure_ascii=False))
