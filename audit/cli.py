"""`havengate audit`: verify, prove, search, export, prune, status, witness and what goes with them.

The commands only ask and print. The program root calls `build` with an `AuditCommands`, whose
functions open things when a command needs them: `verify` and `prove` with `--log` and `--key`, and
`verify-proof` with `--key`, read no configuration and open no key server, so they work on any
machine that holds a copy of the log, or the proof.
Errors pass through to the root, which prints them. Exit codes: 0 done, 1 a problem was found or the
command was refused, 2 wrong command line or configuration, 3 something is not available.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.cli_records import add_export, add_rebuild, add_search
from audit.cli_shared import (
    PROBLEM_FOUND,
    AuditCommands,
    AuditProgram,
    JSONOption,
    KeyOption,
    LogOption,
    chosen_keys,
    log_directory,
    parse_keys,
    print_json,
    progress_bar,
    read_file,
    write_file,
)
from audit.cli_views import print_proof, print_report, proof_object, report_object
from audit.errors import AuditConfigurationError, LogTamperedError, MalformedQueryError
from audit.export.csv import rfc3339
from audit.note import VerifierKey
from audit.proof import parse_proof, verify_proof
from audit.proof import prove as make_proof
from audit.reader import LogReader
from audit.recovery import read_checkpoint
from audit.retention import SIX_YEARS_DAYS, first_kept, plan_prune, prune, retained_from
from audit.search import verify_entries
from audit.verify import examine_log
from audit.witness import LocalSigner, Witness, WitnessServer

__all__ = ["AuditCommands", "AuditProgram", "build"]


def build(commands: AuditCommands) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `audit`."""
    app = typer.Typer(no_args_is_help=True, help="The log: verify, prove, search, export it.")
    _add_verify(app, commands)
    _add_prove(app, commands)
    _add_verify_proof(app, commands)
    add_search(app, commands)
    add_export(app, commands)
    add_rebuild(app, commands)
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
        retention_days: Annotated[
            int | None, typer.Option(min=0, help="Entries may be missing once older than this.")
        ] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Prove every entry, tile and signature; list what was announced and never ended.

        Exits with 1 if anything does not fit. With --log and --key it needs no key server.
        Entries may be missing if the log says that it was pruned and they were old enough: six
        years, or what the configuration or --retention-days says.
        """
        directory = log_directory(commands, log)
        keys = chosen_keys(commands, key, log=log)
        witnesses = parse_keys(witness_key or [])
        if witness_key is None and log is None:
            configured = commands.settings().witnesses
            witnesses = [VerifierKey.parse(one.verifier_key) for one in configured]
        older = None if checkpoint is None else read_file(checkpoint)
        try:
            kept = retained_from(
                LogReader(directory),
                now_s=time.time(),
                retention_days=_least_days(commands, log, retention_days),
            )
        except LogTamperedError:
            # The examination says what is wrong; without a readable state nothing was pruned.
            kept = 0
        with progress_bar("entries") as told:
            report = examine_log(
                directory,
                keys,
                witness_keys=witnesses,
                older_checkpoint=older,
                retained_from=kept,
                progress=told,
            )
        if as_json:
            print_json(report_object(report, kept))
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
        directory = log_directory(commands, log)
        entry, published = _published(directory, index)
        keys = chosen_keys(commands, key, log=log)
        signed = verify_entries(directory, published, keys, {index: entry})
        size = signed.checkpoint.size
        proof = make_proof(directory, index, checkpoint=published, size=size, entry=entry).encode()
        if output is not None:
            write_file(output, proof)
        if as_json:
            found = {"index": index, "size": size, "origin": signed.checkpoint.origin}
            where = {"file": str(output)} if output else {"proof": proof.decode()}
            print_json(found | where)
        elif output is None:
            sys.stdout.buffer.write(proof)
        else:
            typer.echo(f"Entry {index} is in {signed.checkpoint.origin} of {size}: {output}")


def _add_verify_proof(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command("verify-proof")
    def verify_proof_command(
        file: Annotated[Path, typer.Argument(help="A proof file that `prove` made.")],
        *,
        entry: Annotated[
            Path | None,
            typer.Option(help="The entry's bytes, for a proof file that does not hold them."),
        ] = None,
        key: KeyOption = None,
        as_json: JSONOption = False,
    ) -> None:
        """Check a proof file, and show the entry that it proves. With --key it needs nothing else.

        Exits with 1 if the proof does not fit the entry, or no given key signed its checkpoint.
        """
        proof = parse_proof(read_file(file))
        proven = proof.extra if entry is None else read_file(entry)
        if proven is None:
            raise AuditConfigurationError(
                f"{file} does not hold the entry that it proves: name its bytes with --entry."
            )
        signed = verify_proof(proof, proven, chosen_keys(commands, key))
        if as_json:
            print_json(proof_object(proof.index, proven, signed))
        else:
            print_proof(proof.index, proven, signed)


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
            from audit.index import AuditIndex

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
            print_json(found)
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
        reader = LogReader(log_directory(commands, log))
        found: dict[str, Any] = {
            "origin": reader.origin,
            "size": reader.size(),
            "published": reader.published_size(),
            "first": first_kept(reader.directory),
        }
        if log is None:
            from audit.index import AuditIndex

            with AuditIndex(commands.settings().index_url) as index:
                found["indexed"] = index.position()
        if as_json:
            print_json(found)
            return
        for name, value in found.items():
            typer.echo(f"{name.capitalize():<12} {value}")


def _add_key(app: typer.Typer, commands: AuditCommands) -> None:
    @app.command("key")
    def key_command(*, as_json: JSONOption = False) -> None:
        """Print the log's verifier keys, as the key server knows them: for those who verify."""
        texts = [key.text for key in commands.verifier_keys()]
        if as_json:
            print_json({"verifier_keys": texts})
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
        for one in parse_keys(log_key):
            logs.setdefault(one.name, []).append(one)
        signer = LocalSigner.load_or_create(directory / "key")
        made = Witness(directory, name=name, signer=signer, logs=logs)
        host, _, port = listen.rpartition(":")
        if not port.isdigit():
            raise typer.BadParameter("address:port", param_hint="--listen")
        try:
            listening = WitnessServer((host.strip("[]"), int(port)), made)
        except OSError as error:
            raise AuditConfigurationError(
                f"Cannot listen on {listen}: {error.strerror}. Choose another with --listen."
            ) from error
        with listening as server:
            (key,) = [one.text for one in made.verifier_keys()]
            address = "{}:{}".format(*server.server_address[:2])
            if as_json:
                print_json({"verifier_key": key, "listening": address})
            else:
                typer.echo("In the configuration file of the log (Ctrl-C stops this witness):\n")
                typer.echo(f'[[audit.witnesses]]\nurl = "http://{address}"')
                typer.echo(f'verifier_key = "{key}"')
            sys.stdout.flush()
            server.serve_forever()


def _least_days(commands: AuditCommands, log: Path | None, given: int | None) -> int:
    """Return how old an entry has to be before it may be missing."""
    if given is not None:
        return given
    configured = SIX_YEARS_DAYS if log is not None else commands.settings().retention_days
    return min(SIX_YEARS_DAYS, configured)


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
