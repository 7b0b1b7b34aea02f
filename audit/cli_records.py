"""`havengate audit search`, `export` and `rebuild-index`: what asks about exchanges.

Mounted by `audit.cli`; what they work with comes from `audit.cli_shared`.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit.cli_shared import (
    AuditCommands,
    JSONOption,
    KeyOption,
    TenantOption,
    chosen_keys,
    parse_time,
    print_json,
    progress_bar,
    refresh_index,
)
from audit.cli_views import exchange_line, page_object, print_headings
from audit.criteria import Criteria, parse_words
from audit.errors import AuditConfigurationError
from audit.export import FORMATS, Export, run_export
from audit.note import VerifierKey
from audit.reader import LogReader
from audit.recorder import Act, End, Who
from audit.recovery import read_checkpoint
from audit.retention import first_readable
from audit.search import Search, reveal, verify_entries, with_persons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from audit.search import Exchange, Names


def add_search(app: typer.Typer, commands: AuditCommands) -> None:
    """Add `search`."""

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
        rule: Annotated[
            str | None, typer.Option(help="A rule that decided: role.nurse.read.")
        ] = None,
        label: Annotated[
            str | None, typer.Option(help="A sensitivity label of what was seen: PSY, ETHUD.")
        ] = None,
        outcome: Annotated[str | None, typer.Option(help="success, denied, failed.")] = None,
        decision: Annotated[str | None, typer.Option(help="allow or deny.")] = None,
        action: Annotated[str | None, typer.Option(help="read, search, create, admin, …")] = None,
        service: Annotated[str | None, typer.Option(help="Name of a route of the gateway.")] = None,
        request: Annotated[
            str | None, typer.Option(help="Id of one exchange, as `verify` shows it.")
        ] = None,
        tenant: TenantOption = None,
        limit: Annotated[int, typer.Option(min=1, max=1000, help="Exchanges on a page.")] = 50,
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
        """Search by person, patient, time, rule, label, outcome and more; newest first.

        The index finds, the log is shown. --verified proves what is shown, not that nothing is
        left out: for that, rebuild-index first, or export, which reads the whole log. A person who
        was erased cannot be searched for: nothing leads from the name to the entries any more.
        """
        from audit.index import AuditIndex

        asked = Criteria(
            tenant=tenant or commands.tenant(),
            since_us=parse_time(since),
            until_us=parse_time(until),
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
            if () in {asked.actors, asked.patients}:
                # Not the same as "nobody saw it".
                typer.echo("No key is known for this person: erased, or never named.", err=True)
        directory = Path(commands.settings().directory)
        log = LogReader(directory)
        with AuditIndex(commands.settings().index_url) as index:
            refresh_index(index, log)
            page = Search(index, log).page(asked, limit=limit, before=before)
        if verified:
            _verify(directory, log, chosen_keys(commands, key), page.exchanges)
        names = _reveal(commands, page.exchanges) if show_names else [None] * len(page.exchanges)
        if as_json:
            print_json(page_object(page, names, verified=verified))
            return
        print_headings(page.exchanges)
        for exchange, opened in zip(page.exchanges, names, strict=True):
            typer.echo(exchange_line(exchange, opened))
        if not page.exchanges:
            typer.echo("No entries match.", err=True)
        if page.before is not None:
            typer.echo(f"More: --before {page.before}", err=True)


def add_export(app: typer.Typer, commands: AuditCommands) -> None:
    """Add `export`."""

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
        # An export must not begin late unawares.
        first = first_readable(
            log, now_s=time.time(), retention_days=commands.settings().retention_days
        )
        with commands.open_program() as program:
            asked = Criteria(
                tenant=tenant or program.tenant,
                since_us=parse_time(since),
                until_us=parse_time(until),
            )
            wanted = Export(
                format=FORMATS[format_name],
                criteria=with_persons(asked, program.sealer, actor=None, patient=patient),
                tenant=program.tenant,
                who=Who(kind="person", person=program.actor),
                first=first,
                sealer=program.sealer if show_names else None,
            )
            with (
                _sink(output) as write,
                progress_bar("entries") as told,
                # If the reader goes away, the outcome is recorded while the log is still open.
                closing(run_export(wanted, log, program.recorder, progress=told)) as lines,
            ):
                size = sum(write(line) for line in lines)
        if as_json:
            print_json({"file": str(output), "bytes": size, "format": format_name})


def add_rebuild(app: typer.Typer, commands: AuditCommands) -> None:
    """Add `rebuild-index`."""

    @app.command("rebuild-index")
    def rebuild_index(*, as_json: JSONOption = False) -> None:
        """Throw the search index away and make it anew from the log. Needs no key server."""
        from audit.index import AuditIndex

        settings = commands.settings()
        log = LogReader(Path(settings.directory))
        # What is missing without having been pruned must not be missing from the index unawares.
        first_readable(log, now_s=time.time(), retention_days=settings.retention_days)
        begun = time.monotonic()
        with AuditIndex.anew(settings.index_url) as index:
            done = refresh_index(index, log)
        elapsed_s = time.monotonic() - begun
        if as_json:
            print_json({"indexed": done, "elapsed_s": round(elapsed_s, 3)})
        else:
            typer.echo(f"Indexed {done} entries in {elapsed_s:.1f} s.")


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
