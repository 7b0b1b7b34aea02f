"""`havengate keys`: status, rotate, trim, erase, check, and the set-up of an existing server.

The commands only ask and print. What they work with is opened by the program root, which calls
`build` with functions that open it for the length of one command. Errors pass through: the root
prints them and chooses the exit code. A check that finds something wrong exits with 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from keys import cli_pseudonyms
from keys.cli_pseudonyms import PseudonymCommands
from keys.errors import EmbeddedServerError, KeyConfigurationError, UnknownPersonError

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from keys.blindindex import BlindIndex
    from keys.bootstrap import BootstrapReport
    from keys.epochs import EpochKeeper
    from keys.erasure import Eraser
    from keys.model import CheckReport, EpochStatus, ErasureReceipt
    from keys.vault import VaultClient

PROBLEM_FOUND = 1

JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysProgram:
    """What one command works with.

    `actor` is who runs it, for the log. `verify_server` raises `EmbeddedServerError` if a server
    that Havengate runs has lost its own audit file; for others it does nothing.
    """

    tenant: str
    actor: str
    server: VaultClient
    keeper: EpochKeeper
    eraser: Eraser
    index: BlindIndex
    verify_server: Callable[[], None]
    #: Ids of keys of which the log says that an erasure destroyed them.
    erased_in_log: Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysCommands:
    """How the commands get what they work with.

    `open_program` opens everything, the log included; through `open_to_look` nothing can be
    changed, and the log is not needed. `set_up` prepares the configured server with
    an administrator's token and leaves the roles' credentials in a directory.
    """

    open_program: Callable[[], AbstractContextManager[KeysProgram]]
    open_to_look: Callable[[], AbstractContextManager[KeysProgram]]
    set_up: Callable[[str, Path], BootstrapReport]
    pseudonyms: PseudonymCommands


def build(commands: KeysCommands) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `keys`."""
    app = typer.Typer(no_args_is_help=True, help="Keys of persons: look after them, erase them.")
    _add_status(app, commands)
    _add_rotate(app, commands)
    _add_trim(app, commands)
    _add_rotate_index(app, commands)
    _add_erase(app, commands)
    _add_erase_again(app, commands)
    _add_check(app, commands)
    _add_set_up(app, commands)
    cli_pseudonyms.add(app, commands.pseudonyms)
    return app


def _add_status(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command()
    def status(*, as_json: JSONOption = False) -> None:
        """Show the key server, epochs, how many keys there are, and what is due."""
        with commands.open_to_look() as program:
            health = program.server.health()
            server = {
                "address": program.server.address,
                "version": health.version,
                "sealed": health.sealed,
                "standby": health.standby,
            }
            if not as_json:
                # Shown even if the server is sealed and so cannot say more.
                state = "sealed" if health.sealed else "unsealed"
                typer.echo(f"Key server   {server['address']}, version {health.version}, {state}")
            found = _status_object(program.keeper.status())
        if as_json:
            _print_json({"server": server, **found})
        else:
            _print_status(found)


def _add_rotate(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command()
    def rotate(*, as_json: JSONOption = False) -> None:
        """Begin a new epoch and rewrap every key under it. No key leaves the server."""
        with commands.open_program() as program, _progress("rewrapped") as told:
            report = program.keeper.rotate(actor=program.actor, progress=told)
        if as_json:
            _print_json(
                {
                    "epoch": report.epoch,
                    "rewrapped": report.rewrapped,
                    "resumed": report.resumed,
                }
            )
            return
        begun = "Finished the interrupted rotation to" if report.resumed else "Began"
        typer.echo(f"{begun} epoch {report.epoch}; {report.rewrapped} keys rewrapped.")


def _add_trim(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command()
    def trim(
        *,
        before: Annotated[
            int | None,
            typer.Option(
                help="Destroy every epoch before this one, due or not. Without it: those due."
            ),
        ] = None,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
        as_json: JSONOption = False,
    ) -> None:
        """Destroy old epochs for good: wrapped keys in old backups can then never be opened."""
        if before is not None and not yes:
            typer.confirm(
                f"Backups of the key table from before epoch {before} will be of no use. Go on?",
                abort=True,
                err=True,
            )
        with commands.open_program() as program:
            report = program.keeper.trim(actor=program.actor, oldest=before)
            retired = program.index.retire(actor=program.actor)
        if as_json:
            found = {"oldest_epoch": report.oldest, "trimmed": report.trimmed}
            _print_json({**found, "index_keys_destroyed": len(retired)})
            return
        if retired:
            typer.echo(f"Destroyed {len(retired)} index keys whose window is over.")
        if report.trimmed:
            typer.echo(f"Destroyed {report.trimmed} epochs; the oldest is now {report.oldest}.")
        else:
            typer.echo(f"No epoch is due; the oldest is {report.oldest}.")


def _add_rotate_index(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command("rotate-index")
    def rotate_index(
        *,
        tenant: Annotated[str | None, typer.Option(help="Default: the configured one.")] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Begin a new blind-index key. For `keys.index.window_days` the old one matches too.

        Within that time the apps' records must be written anew, so that they carry new tokens.
        """
        with commands.open_program() as program:
            version = program.index.rotate(tenant=tenant or program.tenant, actor=program.actor)
        if as_json:
            _print_json({"index_version": version})
        else:
            typer.echo(f"Version {version} of the index key is written from now on.")


def _add_erase(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command()
    def erase(
        person: Annotated[str, typer.Argument(help="As the apps name the person: Patient/123.")],
        *,
        tenant: Annotated[str | None, typer.Option(help="Default: the configured one.")] = None,
        receipt: Annotated[
            Path | None, typer.Option(help="Also write the receipt to this new file, as JSON.")
        ] = None,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
        as_json: JSONOption = False,
    ) -> None:
        """Erase a person: destroy their keys now, prove it, and say when the last copy is dead."""
        with commands.open_to_look() as program:
            held = program.eraser.held(tenant=tenant or program.tenant, person=person)
        if held is None:
            raise UnknownPersonError(
                f"Nothing was erased: {person} has no key, and was never erased. Check the "
                "spelling (Patient/7) and the tenant."
            )
        if not yes:
            typer.confirm(
                f"What {held} keys of {person} sealed will be unreadable for good. Go on?",
                abort=True,
                err=True,
            )
        if receipt is not None:
            _make_receipt_file(receipt)
        try:
            with commands.open_program() as program:
                done = program.eraser.erase(
                    tenant=tenant or program.tenant, person=person, actor=program.actor
                )
                # Told before anything is closed: what goes wrong then must not cost the receipt.
                found = _receipt_object(done)
                try:
                    if receipt is not None:
                        receipt.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
                finally:
                    (_print_json if as_json else _print_receipt)(found)
        finally:
            # Without a receipt there is no file that looks like one.
            if receipt is not None and not receipt.stat().st_size:
                receipt.unlink()


def _add_erase_again(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command("erase-again")
    def erase_again(*, as_json: JSONOption = False) -> None:
        """After restoring the key table: destroy again every key that the log says was erased."""
        with commands.open_program() as program:
            revived = program.eraser.revived(program.erased_in_log())
            destroyed = program.eraser.erase_again(key_ids=revived, actor=program.actor)
        if as_json:
            _print_json({"destroyed": destroyed})
        else:
            came_back = len(destroyed) or "No"
            typer.echo(f"{came_back} erased keys had come back; none is left.")


def _add_check(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command()
    def check(*, as_json: JSONOption = False) -> None:
        """Open every key once; look for what is overdue or wrong. Exits with 1 if anything is."""
        with commands.open_to_look() as program, _progress("checked") as told:
            report = program.keeper.check(progress=told)
            server_problem = _problem_of(program.verify_server)
            revived = program.eraser.revived(program.erased_in_log())
        if as_json:
            found = {"server_problem": server_problem, "revived": revived}
            _print_json({**_check_object(report), **found})
        else:
            _print_check(report)
            if server_problem is not None:
                typer.echo(f"Server       {server_problem}")
            if revived:
                typer.echo(
                    f"Revived      {len(revived)} erased keys are back, from a backup of the key "
                    "table: run `havengate keys erase-again`"
                )
        if not report.sound or report.status.overdue or server_problem is not None or revived:
            raise typer.Exit(PROBLEM_FOUND)


def _problem_of(verify: Callable[[], None]) -> str | None:
    try:
        verify()
    except EmbeddedServerError as error:
        return str(error)
    return None


def _add_set_up(app: typer.Typer, commands: KeysCommands) -> None:
    @app.command("set-up")
    def set_up(
        credentials: Annotated[
            Path, typer.Argument(help="Directory in which the roles' credentials are left.")
        ],
        *,
        as_json: JSONOption = False,
    ) -> None:
        """Prepare your own Vault or OpenBao: mounts, keys, policies, roles. Safe to repeat.

        Takes an administrator's token from VAULT_TOKEN, and uses it for nothing else.
        """
        token = os.environ.get("VAULT_TOKEN", "")
        if not token:
            raise KeyConfigurationError(
                "expected an administrator's token in VAULT_TOKEN, got none; log in with "
                "`bao login` or `vault login` and export it for this one command"
            )
        report = commands.set_up(token, credentials)
        if as_json:
            _print_json({"changed": list(report.changed), "credentials": str(credentials)})
            return
        for change in report.changed:
            typer.echo(change)
        typer.echo("Everything is in place." if not report.changed else "Done.")
        typer.echo("In your configuration file, for each role that this machine needs:")
        for role in ("gateway", "operator", "audit"):
            typer.echo(f"\n[keys.vault.roles.{role}]")
            typer.echo(f'role_id_file = "{credentials / role}.role-id"')
            typer.echo(f'secret_id_file = "{credentials / role}.secret-id"')
        typer.echo("\nThen: havengate keys check")


# --- Objects for scripts --------------------------------------------------------------------------


def _status_object(status: EpochStatus) -> dict[str, Any]:
    return {
        "oldest_epoch": status.oldest_epoch,
        "current_epoch": status.current_epoch,
        "keys": dict(status.keys),
        "keys_by_epoch": {str(epoch): count for epoch, count in status.keys_by_epoch.items()},
        "erased_keys": status.erased_keys,
        "roll_due": _day(status.roll_due_at),
        "trim_due": None if status.trim_due_at is None else _day(status.trim_due_at),
        "overdue": list(status.overdue),
    }


def _check_object(report: CheckReport) -> dict[str, Any]:
    return {
        "sound": report.sound,
        "checked": report.checked,
        "broken": list(report.broken),
        "below_oldest": list(report.below_oldest),
        "unfinished_erasures": report.unfinished_erasures,
        **_status_object(report.status),
    }


def _receipt_object(receipt: ErasureReceipt) -> dict[str, Any]:
    return {
        "request": receipt.request_id,
        "tenant": receipt.tenant,
        "destroyed_at": datetime.fromtimestamp(receipt.destroyed_at, UTC).isoformat(
            timespec="seconds"
        ),
        "already_erased": receipt.already_erased,
        "keys_destroyed": list(receipt.key_ids),
        "pseudonyms_deleted": receipt.pseudonyms_deleted,
        "decryption_attempted_afterwards": receipt.proof,
        "every_backup_dead_by": receipt.backups_dead_by.isoformat(),
        "log_index": receipt.log_index,
    }


def _day(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).date().isoformat()


# --- Lines for people -----------------------------------------------------------------------------


def _print_json(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found))


def _print_status(found: dict[str, Any]) -> None:
    typer.echo(
        f"Epochs       {found['current_epoch']} is current, the oldest is {found['oldest_epoch']}"
    )
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(found["keys"].items()))
    typer.echo(f"Keys         {counts or 'none yet'}; {found['erased_keys']} erased")
    trim = f", trim on {found['trim_due']}" if found["trim_due"] else ""
    typer.echo(f"Due          roll on {found['roll_due']}{trim}")
    for due in found["overdue"]:
        command = "trim" if due == "trim" else "rotate"
        typer.echo(f"Overdue      {due}: run `havengate keys {command}`")


def _print_check(report: CheckReport) -> None:
    typer.echo(f"Checked      {report.checked} keys against the key server")
    _print_status(_status_object(report.status))
    if report.broken and len(report.broken) == report.checked:
        typer.echo(
            "Wrong server None of the keys opens: this is probably not the key server that wrapped "
            "them; see keys.vault.address"
        )
        return
    for key_id in report.broken:
        typer.echo(f"Broken       key {key_id} does not open: restore its row from a backup")
    for key_id in report.below_oldest:
        typer.echo(f"Lost         key {key_id} was wrapped by an epoch that is destroyed")
    if report.unfinished_erasures:
        typer.echo(
            f"Unfinished   {report.unfinished_erasures} erasures were interrupted: erase these "
            "persons again to get their receipts"
        )
    if report.sound:
        typer.echo("Sound        every key opens")


def _print_receipt(found: dict[str, Any]) -> None:
    if found["already_erased"]:
        typer.echo("This person was erased before. The receipt then was:")
    count = len(found["keys_destroyed"])
    typer.echo(f"Destroyed    {count} keys at {found['destroyed_at']}")
    typer.echo(f"Pseudonyms   {found['pseudonyms_deleted']} deleted")
    proof = found["decryption_attempted_afterwards"]
    typer.echo(f"Proof        {_proof_in_words(proof)}")
    typer.echo(f"Backups      the last copy anywhere is dead by {found['every_backup_dead_by']},")
    typer.echo("             if epochs are rolled and trimmed on schedule")
    typer.echo(f"In the log   entry {found['log_index']}, request {found['request']}")


def _proof_in_words(proof: str | None) -> str:
    if proof is None:
        return "there was no key, so nothing could be sealed to test with"
    return f"a text sealed just before no longer opens ({proof})"


def _make_receipt_file(path: Path) -> None:
    """Make the file before anything is destroyed: a receipt must not be lost to a wrong path."""
    try:
        path.touch(mode=0o600, exist_ok=False)
    except OSError as error:
        raise KeyConfigurationError(
            f"cannot make the receipt {path}: {error.strerror}; name a new file in a directory "
            "that you may write to (nothing was erased)"
        ) from error


class _progress(AbstractContextManager[Callable[[int], None]]):  # noqa: N801 - reads as a verb
    """A count on standard error while a long command runs; nothing where that is no terminal."""

    def __init__(self, verb: str) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.completed:,} keys " + verb),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        task = self._progress.add_task("", total=None)
        return lambda count: self._progress.update(task, completed=count)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
