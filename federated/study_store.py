"""Studies that were proposed and what became of them, step by step, in the coordinator's database.

Lives here: rows in and rows out. A step is never changed and never removed; who may take one, and
what it means, stands in `federated.approvals`. Persons are kept as a tag that is different for each
study: enough to see that two steps were one person's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Final, Literal

from sqlalchemy import Connection, insert, select

from federated.database import StudyDatabase
from federated.errors import ApprovalError
from federated.manifest import Study, parse_manifest
from federated.schema import studies, study_steps

type StepKind = Literal[
    "propose", "approve", "refuse", "publish", "run", "answer", "release", "withdraw"
]

MAX_STEPS: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step. `role` and `site` say in which capacity; key and signature are hex, or empty.

    `log_index` is where the audit log speaks of it; `at_us` Unix time in microseconds; `answer`,
    of a run that ended well, the SHA-256 of what it gave, in hex.
    """

    kind: StepKind
    role: str = ""
    site: str = ""
    person: str = field(default="", repr=False)
    public_key: str = ""
    signature: str = ""
    at_us: int
    log_index: int
    answer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A study and its steps, in order."""

    study: Study
    steps: tuple[Step, ...]

    def of(self, *kinds: StepKind) -> list[Step]:
        """The steps of these kinds."""
        return [step for step in self.steps if step.kind in kinds]


_FIELDS: Final = tuple(one.name for one in fields(Step))


def person_tag(study_hash: str, person: str) -> str:
    """Who it was, as this study's steps say it."""
    return sha256(f"havengate/approver/v1\n{study_hash}\n{person}".encode()).hexdigest()


class StudyStore:
    """All studies of one database. Threads and processes may share it."""

    def __init__(self, database: StudyDatabase) -> None:
        self._database = database

    def add(self, study: Study, step: Step) -> None:
        """Add a study with its first step.

        Raises `ApprovalError` if it, or another of its id, is there already.
        """
        with self._database.writing() as connection:
            same = (studies.c.study == study.study_hash) | (studies.c.name == study.id)
            if connection.execute(select(studies.c.study).where(same)).first() is not None:
                raise ApprovalError(
                    f"A study {study.id} was proposed before. What is approved cannot be changed: "
                    "propose it under another id."
                )
            connection.execute(
                insert(studies),
                {
                    "study": study.study_hash,
                    "name": study.id,
                    "manifest": study.canonical_bytes().decode(),
                    "proposed_at_us": step.at_us,
                },
            )
            _append(connection, study.study_hash, 0, step)

    def append(self, study_hash: str, step: Step, verify: Callable[[Record], None]) -> Record:
        """Add a step, if `verify` does not raise for what is there at that moment."""
        with self._database.writing() as connection:
            record = _read(connection, study_hash)
            verify(record)
            _append(connection, study_hash, len(record.steps), step)
        return Record(study=record.study, steps=(*record.steps, step))

    def get(self, study_hash: str) -> Record:
        """One study by its hash. Raises `ApprovalError` if there is none."""
        with self._database.reading() as connection:
            return _read(connection, study_hash)

    def find(self, name: str) -> Record:
        """One study by its id or its hash. Raises `ApprovalError` if there is none."""
        statement = select(studies.c.study).where(
            (studies.c.name == name) | (studies.c.study == name)
        )
        with self._database.reading() as connection:
            found = connection.execute(statement).scalar()
            if found is None:
                raise ApprovalError(
                    f"No study {name!r} was proposed here. `havengate study list` shows them."
                )
            return _read(connection, found)

    def all(self) -> list[Record]:
        """Every study, the oldest first."""
        statement = select(studies.c.study).order_by(studies.c.proposed_at_us, studies.c.name)
        with self._database.reading() as connection:
            hashes: Sequence[str] = connection.execute(statement).scalars().all()
            return [_read(connection, one) for one in hashes]


def _read(connection: Connection, study_hash: str) -> Record:
    manifest = connection.execute(
        select(studies.c.manifest).where(studies.c.study == study_hash)
    ).scalar()
    if manifest is None:
        raise ApprovalError("No such study was proposed here.")
    study = parse_manifest(manifest.encode())
    if study.study_hash != study_hash:
        raise ApprovalError("A study in the database is not the one that its hash names.")
    columns = [study_steps.c[name] for name in _FIELDS]
    rows = connection.execute(
        select(*columns).where(study_steps.c.study == study_hash).order_by(study_steps.c.step)
    ).mappings()
    return Record(study=study, steps=tuple(Step(**row) for row in rows))


def _append(connection: Connection, study_hash: str, number: int, step: Step) -> None:
    if number >= MAX_STEPS:
        raise ApprovalError("This study has more steps than any has: propose a new one.")
    values = {name: getattr(step, name) for name in _FIELDS}
    connection.execute(insert(study_steps), {**values, "study": study_hash, "step": number})
