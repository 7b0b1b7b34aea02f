"""CSV (RFC 4180) for spreadsheets: one line for each exchange, with the columns of `COLUMNS`.

A spreadsheet runs a cell that begins with = + - @, tab or carriage return as a formula (OWASP, "CSV
Injection"): such a cell gets an apostrophe in front. Lists are joined by a space, times are UTC in
RFC 3339, persons are sealed unless names were opened. Comes after `audit.search`.
"""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from audit.model import Entry
    from audit.search import Exchange, Names

#: Name of each column, in order. `log_index` is that of the newest entry of the exchange, `intent`
#: that of its first; `outcome` is empty if the log has none.
COLUMNS: Final = (
    "log_index", "intent", "time", "origin", "tenant", "request", "stage", "actor_kind", "actor",
    "role", "client", "purpose", "service", "action", "resources", "patients", "labels", "decision",
    "rules", "obligations", "consent", "break_glass", "outcome", "status", "reason", "bytes_in",
    "bytes_out", "duration_us", "counts", "details",
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class CSV:
    """`audit.export.Format`."""

    name = "csv"

    def head(self) -> bytes:
        """Return the line with the names of the columns."""
        return _line(COLUMNS)

    def rows(self, exchange: Exchange, names: Names | None, origin: str) -> Iterator[bytes]:
        """Yield one line."""
        entry = exchange.newest
        patients = names.patients if names else entry.patients
        resources = (f"{one.type}/{one.id}" if one.id else one.type for one in entry.resources)
        yield _line(
            (
                exchange.log_index,
                exchange.entries[0][0],
                rfc3339(entry.time),
                origin,
                entry.tenant,
                entry.request,
                entry.stage,
                entry.actor.kind,
                names.actor if names else entry.actor.sealed or entry.actor.name,
                entry.actor.role,
                names.client if names else entry.client,
                entry.purpose,
                entry.service,
                entry.action,
                " ".join(resources),
                " ".join(patients),
                " ".join(entry.labels),
                entry.decision,
                " ".join(entry.rules),
                " ".join(entry.obligations),
                entry.consent,
                entry.break_glass,
                entry.outcome,
                entry.status,
                entry.reason,
                entry.bytes_in,
                entry.bytes_out,
                entry.duration_us,
                *_maps(entry),
            )
        )


def _maps(entry: Entry) -> tuple[str, str]:
    counts = " ".join(f"{name}={value}" for name, value in entry.counts.items())
    return counts, " ".join(f"{name}={value}" for name, value in entry.details.items())


def rfc3339(time_us: int) -> str:
    """Return Unix microseconds as UTC; a time beyond the year 9999 as that year's end."""
    try:
        moment = _EPOCH + timedelta(microseconds=time_us)
    except OverflowError:
        moment = datetime.max.replace(tzinfo=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def harmless(cell: object) -> str:
    """Return the cell's text such that no spreadsheet takes it for a formula."""
    text = "" if cell is None else str(cell)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _line(cells: tuple[object, ...]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow([harmless(cell) for cell in cells])
    return buffer.getvalue().encode()
