"""The app of the demo: a small record store that knows nothing of Havengate.

It keeps FHIR resources as JSON in an SQLite file and searches them by string equality. Whatever
protection there is has to have happened before it is called.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Resource = dict[str, Any]


class RecordStore:
    """Resources by reference (`Patient/1`). Close it, or use it in `with`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.path = path
        self._database = sqlite3.connect(path)
        self._database.execute(
            "CREATE TABLE resource (reference TEXT PRIMARY KEY, family TEXT, body TEXT NOT NULL)"
        )

    def put_all(self, rows: Sequence[tuple[str, str | None, Resource]]) -> None:
        """Store resources by reference, with the column that the app searches patients by."""
        with self._database:
            self._database.executemany(
                "INSERT OR REPLACE INTO resource VALUES (?, ?, ?)",
                [(reference, family, json.dumps(body)) for reference, family, body in rows],
            )

    def get(self, reference: str) -> Resource:
        """Return a stored resource. Raises `KeyError` if there is none."""
        row = self._database.execute(
            "SELECT body FROM resource WHERE reference = ?", (reference,)
        ).fetchone()
        if row is None:
            raise KeyError(reference)
        found: Resource = json.loads(row[0])
        return found

    def find_by_family(self, values: list[str]) -> list[str]:
        """Return references of patients whose family column equals one of `values`."""
        marks = ", ".join("?" * len(values))
        rows = self._database.execute(
            f"SELECT reference FROM resource WHERE family IN ({marks}) ORDER BY reference",  # noqa: S608 - only question marks
            values,
        )
        return [str(reference) for (reference,) in rows]

    def bodies(self) -> Iterator[str]:
        """Everything that lies on the app's disk, as it lies there."""
        for (body,) in self._database.execute("SELECT body FROM resource"):
            yield str(body)

    def close(self) -> None:
        """Close the file."""
        self._database.close()
