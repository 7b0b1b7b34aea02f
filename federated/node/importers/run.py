"""Importing: recognise the format, read, fold, and put all of it into the store, or nothing.

Comes before: the importers, which know their formats. Comes after: `node.store.Store.merge`, one
transaction. Readings are folded as they come, so memory grows with days, not with readings; nothing
of a file is written before its last byte was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from federated.errors import ImportDataError
from federated.node.daily import MAX_CELLS, PersonTable
from federated.node.importers.apple import AppleHealth
from federated.node.importers.csv import MappedCSV
from federated.node.importers.fhir import FHIR
from federated.node.importers.fitbit import Fitbit
from federated.node.importers.open_mhealth import OpenMHealth
from federated.node.importers.reading import BadRow, Importer, Options, Progress, Server, reading_of
from federated.node.store import ImportRecord, Store, content_hash

IMPORTERS: Final[tuple[Importer, ...]] = (
    FHIR(), AppleHealth(), Fitbit(), OpenMHealth(), MappedCSV(),
)  # fmt: skip
#: Bad rows that are kept to be shown; all are counted.
SHOWN: Final = 100
_IN_MESSAGE: Final = 10
_HEAD_BYTES: Final = 65_536
#: The store's memory of the server whose ids name its people.
_SERVER: Final = "fhir_server"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did. `changed` tables of people; nothing changed if it was imported before."""

    format: str
    people: int
    new_people: int
    changed: int
    readings: int
    days: int
    bad: int
    bad_rows: Sequence[BadRow]


@dataclass(slots=True)
class _Folded:
    tables: dict[str, PersonTable]
    bad_rows: list[BadRow]
    readings: int = 0
    cells: int = 0
    bad: int = 0
    server: str = ""

    def take_bad(self, row: BadRow) -> None:
        self.bad += 1
        if len(self.bad_rows) < SHOWN:
            self.bad_rows.append(row)


def importer_for(path: Path, *, name: str | None = None, mapping: Path | None = None) -> Importer:
    """The importer of that name, or the one that recognises the file. Raises `ImportDataError`."""
    known = {one.name: one for one in IMPORTERS}
    if name is None and mapping is not None:
        name = MappedCSV.name
    if name is not None:
        if name not in known:
            raise ImportDataError(f"There is no format {name!r}; there are {', '.join(known)}.")
        return known[name]
    with reading_of(path):
        head = b""
        if path.is_file():
            with path.open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
        elif not path.exists():
            raise ImportDataError(f"There is nothing at {path}.")
        for one in IMPORTERS:
            if one.recognises(path, head):
                return one
    raise ImportDataError(
        f"{path} is of no format that is known here: name it with --format, or for a table name "
        "its mapping with --mapping."
    )


def import_path(
    store: Store,
    path: Path,
    options: Options,
    *,
    now: int,
    progress: Progress,
    format_name: str | None = None,
    skip_bad: bool = False,
) -> ImportReport:
    """Import a file or a folder. Importing it again changes nothing.

    Raises `ImportDataError` if it cannot be read, if any row is bad (unless `skip_bad`), or if it
    is too large to be folded at once; the store is then as before.
    """
    importer = importer_for(path, name=format_name, mapping=options.mapping)
    folded = _fold(importer, path, options, progress)
    if folded.bad and not skip_bad:
        raise ImportDataError(_complaint(folded))
    tables = {name: table for name, table in folded.tables.items() if not table.empty}
    record = ImportRecord(
        at=now, format=importer.name, content=content_hash(path), people=len(tables),
        readings=folded.readings, bad=folded.bad,
    )  # fmt: skip
    new_people, changed = _merge(store, tables, record, folded.server) if tables else (0, 0)
    return ImportReport(
        format=importer.name, people=len(tables), new_people=new_people, changed=changed,
        readings=folded.readings, days=folded.cells, bad=folded.bad, bad_rows=folded.bad_rows,
    )  # fmt: skip


def _merge(
    store: Store, tables: dict[str, PersonTable], record: ImportRecord, server: str
) -> tuple[int, int]:
    """Put all into the store, whose people are one server's. Raises `ImportDataError`."""
    with store.database.transaction():
        known = store.meta(_SERVER)
        if server and known not in {None, server}:
            raise ImportDataError(
                "This store holds people of another server, who may have the same ids: keep the "
                "people of each server in a store of their own. Nothing was kept."
            )
        merged = store.merge(tables, record=record)
        if server and known is None:
            store.set_meta(_SERVER, server)
        return merged


def _fold(importer: Importer, path: Path, options: Options, progress: Progress) -> _Folded:
    folded = _Folded({}, [])
    for found in importer.read(path, options, progress):
        if isinstance(found, BadRow):
            folded.take_bad(found)
            continue
        if isinstance(found, Server):
            folded.server = found.address
            continue
        table = folded.tables.setdefault(found.person, PersonTable())
        folded.cells += table.take(found)
        folded.readings += 1
        if folded.cells > MAX_CELLS:
            raise ImportDataError(
                f"{path} makes more than {MAX_CELLS} values of days: import it in parts. Nothing "
                "was kept."
            )
    for table in folded.tables.values():
        for name, _ in table.impossible():
            folded.cells -= 1
            folded.take_bad(
                BadRow(file=path.name, line=0, reason=f"{name} of a whole day is out of range.")
            )
    return folded


def _complaint(folded: _Folded) -> str:
    shown = [
        f"  {row.file}, line {row.line}: {row.reason}"
        if row.line
        else f"  {row.file}: {row.reason}"
        for row in folded.bad_rows[:_IN_MESSAGE]
    ]
    more = folded.bad - len(shown)
    if more:
        shown.append(f"  and {more} more")
    count = "1 value is" if folded.bad == 1 else f"{folded.bad} values are"
    first = f"{count} bad, so nothing was kept; mend the file, or leave them out with --skip-bad:"
    return "\n".join([first, *shown])
