"""What the commands of `havengate audit` share: what the program root gives them, options, helpers.

Before: the program root, which makes an `AuditCommands`. After: `audit.cli`, `audit.cli_records`.
Help and mistakes must not wait for libraries: a database or a progress bar is imported by whoever
needs it, when he does.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.errors import AuditConfigurationError, MalformedQueryError
from audit.note import VerifierKey
from audit.reader import LogReader
from audit.retention import first_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from audit.index import AuditIndex
    from audit.ports import PersonSealer
    from audit.recorder import Appender, Recorder
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


def log_directory(commands: AuditCommands, log: Path | None) -> Path:
    """Return the directory that was named, or the configured one."""
    return Path(commands.settings().directory) if log is None else log


def chosen_keys(
    commands: AuditCommands, given: list[str] | None, *, log: Path | None = None
) -> Sequence[VerifierKey]:
    """Return the log's keys that were given, or else those of the key server."""
    if given:
        return parse_keys(given)
    if log is not None:
        # A copy, on a machine that may have no key server: do not start one.
        raise AuditConfigurationError(
            "No verifier key was given: pass --key KEY, or --key FILE. `havengate audit key` "
            "prints it where the log is written."
        )
    return commands.verifier_keys()


def parse_keys(given: Sequence[str]) -> list[VerifierKey]:
    """Read verifier keys: the text itself, or a file with one a line (# begins a comment)."""
    keys: list[VerifierKey] = []
    for text in given:
        path = Path(text)
        lines = (
            [text] if "+" in text and not path.is_file() else read_file(path).decode().splitlines()
        )
        keys += [VerifierKey.parse(line) for line in lines if line.strip() and line[0] != "#"]
    return keys


def read_file(path: Path) -> bytes:
    """Read a file that was named. Raises `AuditConfigurationError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuditConfigurationError(f"{path} cannot be read: {error.strerror}.") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file that was named. Raises `AuditConfigurationError`."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise AuditConfigurationError(f"{path} cannot be written: {error.strerror}.") from error


def parse_time(text: str | None) -> int | None:
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


def refresh_index(index: AuditIndex, log: LogReader) -> int:
    """Bring the index up to the log; return how many entries were added."""
    with progress_bar("indexed") as told:
        size = log.size()
        done = index.refresh(
            log, first=first_kept(log.directory), progress=lambda position: told(position, size)
        )
    return done.added


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(f"{{task.completed:,.0f}} {what}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(found: dict[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(found, ensure_ascii=False))
