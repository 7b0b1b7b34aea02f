"""`havengate device`: the person's side. Import, look, agree, take back, pause, leave, erase.

Commands only ask and print; errors pass through to the root, which prints them and chooses the exit
code. Every command works on the store of this device, or of a site with `--store`; where a store
holds several people, `--person` says whose command it is. `--json` prints one JSON object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from federated.errors import ImportDataError, StoreError
from federated.node import cli_budget
from federated.node.cli_consent import consent_app
from federated.node.cli_shared import (
    DEFAULT_STORE,
    JSONOption,
    KeyFileOption,
    PersonOption,
    Place,
    StoreOption,
    YesOption,
    day_text,
    now,
    opened_store,
    person_of,
    plain,
    print_json,
    say,
)

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from federated.node.store import Person, Store

device_app = typer.Typer(
    no_args_is_help=True, help="Your data on this device: what is here, and who may ask about it."
)
device_app.add_typer(consent_app, name="consent")


@device_app.callback()
def _device(
    context: typer.Context, *, store: StoreOption = DEFAULT_STORE, key_file: KeyFileOption = None
) -> None:
    context.obj = Place(store, key_file)


@device_app.command("init")
def init(context: typer.Context, *, as_json: JSONOption = False) -> None:
    """Make an empty, encrypted store."""
    from federated.node.store import Store

    place: Place = context.obj
    place.store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    Store.create(place.store, place.keeper()).close()
    keys = str(place.key_file) if place.key_file else "key ring"
    if as_json:
        print_json({"store": str(place.store), "keys": keys})
        return
    say(f"Store        {place.store}")
    say(f"Keys         {keys}")
    if place.key_file:
        say("             A file of mode 0600, not a key ring: keep it out of every backup.")


@device_app.command("enrol")
def enrol_command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The enrolment that your clinic gave you.")],
    *,
    as_json: JSONOption = False,
) -> None:
    """Learn whose signatures count. Nothing of it ever comes with a study."""
    from federated.node.enrolment import MAX_BYTES, enrol, parse_enrolment

    try:
        with file.open("rb") as opened:
            enrolment = parse_enrolment(opened.read(MAX_BYTES + 1))
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}.") from error
    with opened_store(context) as store:
        enrol(store, enrolment)
    if as_json:
        print_json({"node": enrolment.node, "log": enrolment.origin, "sites": [*enrolment.sites]})
        return
    say(f"Node         {enrolment.node}")
    say(f"Study log    {enrolment.origin}")
    say(f"Sites        {', '.join(enrolment.sites) or '-'}")


@device_app.command("import")
def import_command(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A file, a folder, or a ZIP archive.")],
    *,
    person: PersonOption = None,
    format_name: Annotated[
        str | None, typer.Option("--format", help="Its format, if it is not recognised.")
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(
            help="For a table: a mapping file, or one that comes along (nhanes, paco, …)."
        ),
    ] = None,
    time_zone: Annotated[
        str | None, typer.Option(help="Your own, as Europe/Vienna: where the file has UTC times.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad values out.")] = False,
    as_json: JSONOption = False,
) -> None:
    """Import FHIR, Apple Health, Fitbit, Open mHealth or tables. All of it, or nothing."""
    from federated.node.importers.reading import Options
    from federated.node.importers.run import import_path

    try:
        zone = None if time_zone is None else ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ImportDataError("There is no such time zone: write one as Europe/Vienna.") from None
    options = Options(person=person, time_zone=zone, mapping=mapping)
    with opened_store(context) as store, _progress(path.name) as told:
        report = import_path(
            store, path, options, now=now(), progress=told, format_name=format_name,
            skip_bad=skip_bad,
        )  # fmt: skip
    rows = [{"file": r.file, "line": r.line, "reason": r.reason} for r in report.bad_rows]
    if as_json:
        print_json(
            {
                "format": report.format, "people": report.people, "new_people": report.new_people,
                "changed": report.changed, "readings": report.readings, "days": report.days,
                "bad": report.bad, "bad_rows": rows,
            }
        )  # fmt: skip
        return
    say(f"Read         {report.readings:,} readings ({report.format})")
    say(f"People       {report.people:,}, of whom {report.new_people:,} are new")
    say(f"Changed      {report.changed:,}" if report.changed else "Changed      nothing")
    if report.bad:
        say(f"Left out     {report.bad:,} bad values, such as:")
        for row in rows[:5]:
            say(f"             {row['file']}, line {row['line']}: {row['reason']}")


@device_app.command("data")
def data(
    context: typer.Context,
    *,
    person: PersonOption = None,
    values: Annotated[
        bool, typer.Option("--values", help="Show the values too: they are yours to see.")
    ] = False,
    as_json: JSONOption = False,
) -> None:
    """Show what there is about you: columns, days, sources. Where there are many people: who."""
    from federated.node.past import kept_of

    with opened_store(context, older="say") as store:
        if person is None and len(store.people()) != 1:
            _show_people(store.people(), as_json=as_json)
            return
        whose = person_of(store, person)
        held, kept = store.holdings(whose), kept_of(store, whose)
        table = _values(store, whose) if values else {}
    found = [
        {
            "column": one.column, "source": one.source, "unit": one.found_unit, "days": one.days,
            "first": day_text(one.first_day), "last": day_text(one.last_day),
        }
        for one in held
    ]  # fmt: skip
    trainings = [
        {"study_hash": one.study, "query": one.query, "until": day_text(one.until // 86_400)}
        for one in kept
    ]
    if as_json:
        more = {"values": table} if values else {}
        print_json(
            {
                "person": whose.name, "state": whose.state, "data": found, "kept": trainings,
                **more,
            }
        )  # fmt: skip
        return
    for row in found:
        span = f"{row['days']:>6} days  {row['first']} to {row['last']}"
        say(f"{row['column']:<24} {span}  {row['source']}")
    for one in trainings:
        say(
            f"Kept until {one['until']}: what you brought to the training {one['query']} of the "
            f"study {one['study_hash'][:16]}…, which later rounds send again"
        )
    for day, cells in table.items():
        say(f"{day}  " + "  ".join(f"{name} {value:g}" for name, value in cells.items()))


def _values(store: Store, whose: Person) -> dict[str, dict[str, float]]:
    rows = store.own_rows(whose)
    return {
        day_text(day): {
            name: float(series[place])
            for name, series in rows.values.items()
            if not math.isnan(series[place])
        }
        for place, day in enumerate(rows.days.tolist())
    }


def _show_people(people: tuple[Person, ...], *, as_json: bool) -> None:
    if as_json:
        print_json({"people": [{"person": one.name, "state": one.state} for one in people]})
        return
    for one in people:
        say(f"{one.name:<40} {one.state}")
    say(f"{len(people):,} people")


@device_app.command("columns")
def columns(*, as_json: JSONOption = False) -> None:
    """List the columns of the daily table: units, ranges, meanings, LOINC codes."""
    from federated.node.columns import COLUMNS

    if as_json:
        print_json(
            [
                {
                    "name": c.name, "unit": c.unit, "low": c.low, "high": c.high,
                    "meaning": c.meaning, "loinc": list(c.codes),
                }
                for c in COLUMNS.values()
            ]
        )  # fmt: skip
        return
    for column in COLUMNS.values():
        say(f"{column.name:<24} {column.unit:<8} {column.meaning}")


device_app.command("receipts")(cli_budget.receipts)
device_app.command("budget")(cli_budget.budget)
device_app.command("cap")(cli_budget.cap)
device_app.command("check")(cli_budget.check)


def _set_state(
    context: typer.Context, person: str | None, change: Callable[[Store, Person], None]
) -> str:
    with opened_store(context) as store:
        whose = person_of(store, person)
        change(store, whose)
        return whose.name


@device_app.command("pause")
def pause(
    context: typer.Context, *, person: PersonOption = None, as_json: JSONOption = False
) -> None:
    """Refuse everything until `resume`."""
    _set_state(context, person, lambda s, p: s.set_state(p, "paused", now=now()))
    _said("paused", "Paused. Nothing is answered until `havengate device resume`.", as_json=as_json)


@device_app.command("resume")
def resume(
    context: typer.Context, *, person: PersonOption = None, as_json: JSONOption = False
) -> None:
    """Take part again, in what you agreed to."""
    _set_state(context, person, lambda s, p: s.set_state(p, "taking_part", now=now()))
    _said("taking_part", "You take part again, in what you agreed to.", as_json=as_json)


@device_app.command("leave")
def leave(
    context: typer.Context,
    *,
    person: PersonOption = None,
    yes: YesOption = False,
    as_json: JSONOption = False,
) -> None:
    """Leave for good: every consent is taken back, and everything is refused."""
    from federated.node.consent import Consents

    if not yes:
        typer.confirm("Leave all studies, and take back all consents?", abort=True, err=True)

    def change(store: Store, whose: Person) -> None:
        with store.database.transaction():
            Consents(store).revoke(whose, now=now())
            store.set_state(whose, "left", now=now())

    _set_state(context, person, change)
    _said(
        "left",
        "You have left. Your data are still here: `havengate device erase` destroys them. What was "
        "published before stays published, and what was spent stays spent.",
        as_json=as_json,
    )


@device_app.command("withdraw")
def withdraw(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="The study's id, as on the receipt.")],
    *,
    person: PersonOption = None,
    as_json: JSONOption = False,
) -> None:
    """Withdraw from one study: what it releases from now on goes without you."""
    from federated.node.receipts import Receipts

    with opened_store(context) as store:
        whose = person_of(store, person)
        store.withdraw(whose, study, now=now())
        known = any(one.told.study == study for one in Receipts(store).of(whose))
    words = (
        f"You withdrew from {study}: later releases go without you. A sum that was published "
        "cannot be taken back, so what was spent stays spent."
    )
    if not known:
        words += f"\nNo study {study} has asked here yet: compare the id with your receipts."
    _said("withdrawn", words, as_json=as_json)


@device_app.command("erase")
def erase(
    context: typer.Context,
    *,
    person: PersonOption = None,
    yes: YesOption = False,
    as_json: JSONOption = False,
) -> None:
    """Destroy the keys, then the data: a person's with --person, else the whole store's."""
    from federated.node.store import erase_at

    place: Place = context.obj
    what = plain(f"everything about {person}" if person else "the whole store")
    if not yes:
        typer.confirm(f"Erase {what}? Nobody can undo it.", abort=True, err=True)
    if person is None:
        erase_at(place.store, place.keeper())
    else:
        with opened_store(context, older="take") as store:
            store.erase_person(store.person(person))
    words = "Erased: the keys are destroyed, so no copy, in a backup neither, can be read any more."
    if place.key_file:
        words += (
            "\nOnly a copy of the key file from before, if there is one, still opens old copies."
        )
    _said("erased", words, as_json=as_json)


def _said(state: str, words: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"state": state})
    else:
        say(words)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while a file is read; nothing where that is no terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(plain(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
