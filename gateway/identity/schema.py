"""The tables of the directory, and the migrations that make them.

Plain SQL that SQLite and PostgreSQL both understand; a migration never changes once released.
Tokens, devices, log-in attempts, revoked tokens and their subjects appear as SHA-256 only.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Connection, Double, MetaData, Table, Text

from gateway.errors import GatewayConfigurationError
from keys import sql

metadata = MetaData()

accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("login", Text, nullable=False, unique=True),
    Column("password_hash", Text, nullable=False),
    Column("roles", Text, nullable=False),
    Column("patient", Text),
    Column("represents", Text, nullable=False),
    Column("refs", Text, nullable=False),
    Column("locked", BigInteger, nullable=False),
    Column("must_set_second_factor", BigInteger, nullable=False),
    Column("totp_counter", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_hash", Text, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("account", Text, nullable=False),
    Column("began_at", Double, nullable=False),
    Column("used_at", Double, nullable=False),
    Column("second_factor", Text, nullable=False),
    Column("second_factor_at", Double, nullable=False),
    Column("ended_at", Double),
)

grants = Table(
    "grants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("patient", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("begins_at", Double, nullable=False),
    Column("ends_at", Double, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("subject", Text, nullable=False),
    Column("at", Double, nullable=False),
)

revoked_tokens = Table(
    "revoked_tokens",
    metadata,
    Column("token", Text, primary_key=True),
    Column("until", Double, nullable=False),
)

revoked_subjects = Table(
    "revoked_subjects",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("issued_before", Double, nullable=False),
    Column("until", Double, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("device", Text, primary_key=True),
    Column("account", Text, primary_key=True),
    Column("seen_at", Double, nullable=False),
)

#: The n-th entry leads from version n to n + 1.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE accounts (
            id TEXT PRIMARY KEY,
            login TEXT NOT NULL UNIQUE,
            password_hash TEXT NOT NULL,
            roles TEXT NOT NULL,
            patient TEXT,
            represents TEXT NOT NULL,
            refs TEXT NOT NULL,
            locked BIGINT NOT NULL,
            must_set_second_factor BIGINT NOT NULL,
            totp_counter BIGINT NOT NULL,
            created_at DOUBLE PRECISION NOT NULL)""",
        """CREATE TABLE sessions (
            token_hash TEXT PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            account TEXT NOT NULL,
            began_at DOUBLE PRECISION NOT NULL,
            used_at DOUBLE PRECISION NOT NULL,
            second_factor TEXT NOT NULL,
            second_factor_at DOUBLE PRECISION NOT NULL,
            ended_at DOUBLE PRECISION)""",
        "CREATE INDEX sessions_by_account ON sessions (account)",
        """CREATE TABLE grants (
            id TEXT PRIMARY KEY,
            account TEXT NOT NULL,
            patient TEXT NOT NULL,
            reason TEXT NOT NULL,
            begins_at DOUBLE PRECISION NOT NULL,
            ends_at DOUBLE PRECISION NOT NULL)""",
        "CREATE INDEX grants_by_account ON grants (account, ends_at)",
        """CREATE TABLE attempts (
            id TEXT PRIMARY KEY,
            subject TEXT NOT NULL,
            at DOUBLE PRECISION NOT NULL)""",
        "CREATE INDEX attempts_by_subject ON attempts (subject, at)",
        "CREATE TABLE revoked_tokens (token TEXT PRIMARY KEY, until DOUBLE PRECISION NOT NULL)",
    ),
    (
        """CREATE TABLE devices (
            device TEXT NOT NULL,
            account TEXT NOT NULL,
            seen_at DOUBLE PRECISION NOT NULL,
            PRIMARY KEY (device, account))""",
        "CREATE INDEX devices_by_account ON devices (account, seen_at)",
    ),
    (
        """CREATE TABLE revoked_subjects (
            subject TEXT PRIMARY KEY,
            issued_before DOUBLE PRECISION NOT NULL,
            until DOUBLE PRECISION NOT NULL)""",
    ),
)

#: Any number that no other program on a shared PostgreSQL server locks.
ADVISORY_LOCK = 0x4847_4944_4952


def migrate(connection: Connection) -> int:
    """Bring the database to this code's version, which is returned, in the caller's transaction.

    Raises `GatewayConfigurationError` if the database is newer.
    """
    found, known = sql.migrate(connection, "directory_version", MIGRATIONS)
    if found > known:
        raise GatewayConfigurationError(
            f"expected a directory of version {known} or older, got version {found}; "
            "run the Havengate release that wrote it, or a newer one"
        )
    return known
