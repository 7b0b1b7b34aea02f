"""People out of a table, in memory, through the very importer that fills a device's store.

For public and made-up people only: nothing here asks for consent, keeps a budget or guards a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from federated.errors import ImportDataError
from federated.model import PersonRows
from federated.node.columns import column as column_of
from federated.node.daily import PersonTable, Reading
from federated.node.importers.csv import MappedCSV
from federated.node.importers.reading import BadRow, Options

_NOTHING_KNOWN = "A row cannot be taken"


def people_of(
    table: Path, *, mapping: str | Path, columns: Iterable[str], having: str | None = None
) -> tuple[PersonRows, ...]:
    """Everybody in a public table, with these columns of the daily table, in the file's order.

    `mapping` is a mapping file, or the name of one that comes along (`nhanes`, `paco`). `having`
    keeps only people of whom this column is known. Raises `ImportDataError` for a file or mapping
    that cannot be read, for a bad row (it names the line and no value), and for an unknown column.
    """
    wanted = frozenset(columns) | (frozenset() if having is None else {having})
    for name in wanted:
        column_of(name)
    people: dict[str, PersonTable] = {}
    options = Options(mapping=Path(mapping))
    for found in MappedCSV().read(table, options, lambda *_: None):
        match found:
            case Reading():
                if found.column.name in wanted:
                    people.setdefault(found.person, PersonTable()).take(found)
            case BadRow():
                raise ImportDataError(
                    f"{_NOTHING_KNOWN}: {found.file}, line {found.line}: {found.reason}"
                )
            case _:
                raise ImportDataError(f"{table.name} is no table of daily values.")
    for one in people.values():
        for name, _ in one.impossible():
            raise ImportDataError(f"{table.name}: {name} of a whole day is out of range.")
    return tuple(
        one.rows(wanted)
        for one in people.values()
        if having is None or any(name == having for name, _ in one.cells)
    )
