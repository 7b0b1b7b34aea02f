"""The tables of the coordinator's database, and the migrations that make them. Nothing here runs.

A migration is plain SQL that SQLite and PostgreSQL both understand, and never changes once
released. The tables below are what the newest migration leaves; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, MetaData, Table, Text

metadata = MetaData()

#: What was reserved, spent and mended, in order; each row's hash covers the one before. `lost` says
#: which row of the audit log a mended one stands for.
ledger_rows = Table(
    "ledger_rows",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("reservation", Text, nullable=False),
    Column("study", Text, nullable=False),
    Column("round", Text, nullable=False),
    Column("cost", Text, nullable=False),
    Column("participants", BigInteger, nullable=False),
    Column("participants_hash", Text, nullable=False),
    Column("lost", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("previous", Text, nullable=False),
    Column("hash", Text, nullable=False),
)

#: Whom a row charges; `*` is everybody, known or not.
ledger_charges = Table(
    "ledger_charges",
    metadata,
    Column("participant", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
)

#: Every study that was proposed, as its canonical bytes.
studies = Table(
    "studies",
    metadata,
    Column("study", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("manifest", nullable=False),
    Column("proposed_at_us", BigInteger, nullable=False),
)

#: What became of each study, step by step, never changed: who (as a tag of this study, and his
#: key), in which role, and the signature. `log_index` is the entry that says so; `answer` the hash
#: of what a run gave.
study_steps = Table(
    "study_steps",
    metadata,
    Column("study", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("person", Text, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("signature", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("log_index", BigInteger, nullable=False),
    Column("answer", Text, nullable=False),
)

#: The n-th entry leads from version n to n + 1.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE ledger_rows (
            sequence BIGINT PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('reserve', 'spend', 'mend')),
            reservation TEXT NOT NULL,
            study TEXT NOT NULL,
            round TEXT NOT NULL,
            cost TEXT NOT NULL,
            participants BIGINT NOT NULL,
            participants_hash TEXT NOT NULL,
            lost TEXT NOT NULL,
            at_us BIGINT NOT NULL,
            previous TEXT NOT NULL,
            hash TEXT NOT NULL)""",
        "CREATE UNIQUE INDEX ledger_rows_by_reservation ON ledger_rows (reservation, kind, lost)",
        "CREATE INDEX ledger_rows_by_study ON ledger_rows (study, round)",
        """CREATE TABLE ledger_charges (
            participant TEXT NOT NULL,
            sequence BIGINT NOT NULL REFERENCES ledger_rows (sequence),
            PRIMARY KEY (participant, sequence))""",
        "CREATE INDEX ledger_charges_by_sequence ON ledger_charges (sequence)",
        """CREATE TABLE studies (
            study TEXT PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            manifest TEXT NOT NULL,
            proposed_at_us BIGINT NOT NULL)""",
        """CREATE TABLE study_steps (
            study TEXT NOT NULL REFERENCES studies (study),
            step BIGINT NOT NULL,
            kind TEXT NOT NULL,
            role TEXT NOT NULL,
            site TEXT NOT NULL,
            person TEXT NOT NULL,
            public_key TEXT NOT NULL,
            signature TEXT NOT NULL,
            at_us BIGINT NOT NULL,
            log_index BIGINT NOT NULL,
            PRIMARY KEY (study, step))""",
    ),
    ("ALTER TABLE study_steps ADD COLUMN answer TEXT NOT NULL DEFAULT ''",),
)
