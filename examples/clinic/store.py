"""The clinic's records in one SQLite file: every version of every resource, and what finds them.

`resource` has all versions, `current` those that are there now, `term` what each can be found by
(`examples.clinic.search` says which), `mood` the diary. Calls block; one process writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import orjson

from examples.clinic.search import terms

Resource = dict[str, Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS resource (
  type TEXT, id TEXT, version INTEGER, updated TEXT, body BLOB, PRIMARY KEY (type, id, version));
CREATE TABLE IF NOT EXISTS current (
  type TEXT, id TEXT, version INTEGER, updated TEXT, body BLOB, PRIMARY KEY (type, id));
CREATE TABLE IF NOT EXISTS term (type TEXT, id TEXT, param TEXT, value TEXT, until TEXT);
CREATE INDEX IF NOT EXISTS term_value ON term (type, param, value, until, id);
CREATE INDEX IF NOT EXISTS term_id ON term (type, id, param, value);
CREATE TABLE IF NOT EXISTS mood (
  patient TEXT, id TEXT, at TEXT, mood INTEGER, note TEXT, PRIMARY KEY (patient, id));
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of a resource; without a body it says that the resource was deleted."""

    type: str
    id: str
    version: int
    updated: str
    body: bytes | None = field(repr=False)


class Store:
    """Resources by type and id. Close it, or use it in `with`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Generator[None]:
        """All writes in the block, or none if it raises. Blocks may be nested."""
        self.database.execute("SAVEPOINT here")
        try:
            yield
        except BaseException:
            self.database.execute("ROLLBACK TO here")
            self.database.execute("RELEASE here")
            raise
        self.database.execute("RELEASE here")

    def write(self, kind: str, name: str, resource: Resource | None) -> Version:
        """Store the next version and give it its `meta`; None deletes what is there."""
        earlier = self.versions(kind, name)
        number = earlier[0].version + 1 if earlier else 1
        updated = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        body = None
        if resource is not None:
            meta = resource.get("meta") or {}
            meta = {**meta, "versionId": str(number), "lastUpdated": updated}
            resource = {**resource, "resourceType": kind, "id": name, "meta": meta}
            body = orjson.dumps(resource)
        row = (kind, name, number, updated, body)
        with self.transaction():
            self.database.execute("INSERT INTO resource VALUES (?, ?, ?, ?, ?)", row)
            for table in ("current", "term"):
                self.database.execute(f"DELETE FROM {table} WHERE type=? AND id=?", row[:2])  # noqa: S608 - two words from above
            if resource is not None:
                self.database.execute("INSERT INTO current VALUES (?, ?, ?, ?, ?)", row)
                self.database.executemany(
                    "INSERT INTO term VALUES (?, ?, ?, ?, ?)",
                    {(kind, name, *term) for term in terms(resource)},
                )
        return Version(type=kind, id=name, version=number, updated=updated, body=body)

    def get(self, kind: str, name: str) -> Version | None:
        """The current version, or None."""
        return next(self.select("SELECT * FROM current WHERE type=? AND id=?", (kind, name)), None)

    def versions(self, kind: str, name: str | None = None) -> list[Version]:
        """All versions of one resource, or of all of a type, newest first."""
        which, args = ("AND id=?", [kind, name]) if name is not None else ("", [kind])
        return list(
            self.select(
                f"SELECT * FROM resource WHERE type=? {which} ORDER BY updated DESC, version DESC",  # noqa: S608 - no data
                args,
            )
        )

    def select(self, query: str, args: list[Any] | tuple[Any, ...]) -> Iterator[Version]:
        """Run a query whose columns are those of `current`."""
        for kind, name, version, updated, body in self.database.execute(query, args):
            yield Version(type=kind, id=name, version=version, updated=updated, body=body)
