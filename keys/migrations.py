"""Versioned, forward-only migrations of the key table: each runs once, whole or not at all.

A migration is plain SQL that SQLite and PostgreSQL both understand, and never changes once
released. A database that is newer than this code is refused: older code would not know which
columns to destroy.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from keys import sql
from keys.errors import KeyConfigurationError

#: The n-th entry leads from version n to n + 1.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE data_keys (
            key_id TEXT PRIMARY KEY,
            kind TEXT NOT NULL CHECK (kind IN ('person', 'system', 'index', 'pseudonym')),
            tenant TEXT NOT NULL,
            owner_name TEXT,
            version BIGINT NOT NULL CHECK (version >= 1),
            epoch BIGINT,
            wrapped TEXT,
            reserved BIGINT NOT NULL CHECK (reserved >= 0),
            created_at DOUBLE PRECISION NOT NULL,
            retired_at DOUBLE PRECISION,
            erased_at DOUBLE PRECISION,
            CHECK ((erased_at IS NULL AND wrapped IS NOT NULL
                    AND epoch IS NOT NULL AND owner_name IS NOT NULL)
                OR (erased_at IS NOT NULL AND wrapped IS NULL
                    AND epoch IS NULL AND owner_name IS NULL)))""",
        # Two processes that make the first key of one person at once end with one key.
        "CREATE UNIQUE INDEX data_keys_by_owner ON data_keys (tenant, kind, owner_name, version)",
        "CREATE INDEX data_keys_by_epoch ON data_keys (epoch, key_id)",
        """CREATE TABLE key_state (
            id BIGINT PRIMARY KEY CHECK (id = 1),
            generation BIGINT NOT NULL,
            oldest_epoch BIGINT NOT NULL)""",
        "INSERT INTO key_state (id, generation, oldest_epoch) VALUES (1, 1, 0)",
        """CREATE TABLE key_epochs (
            epoch BIGINT PRIMARY KEY,
            began_at DOUBLE PRECISION NOT NULL,
            rewrapped_at DOUBLE PRECISION)""",
        """CREATE TABLE key_erasures (
            request_id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL,
            subject TEXT NOT NULL,
            key_ids TEXT NOT NULL,
            pseudonyms_deleted BIGINT NOT NULL,
            destroyed_at DOUBLE PRECISION NOT NULL,
            backups_dead_by TEXT NOT NULL,
            probe TEXT,
            proof TEXT,
            log_index BIGINT)""",
        "CREATE INDEX key_erasures_by_subject ON key_erasures (tenant, subject)",
        """CREATE TABLE pseudonyms (
            tenant TEXT NOT NULL,
            pseudonym TEXT NOT NULL,
            owner_name TEXT NOT NULL,
            sealed TEXT NOT NULL,
            PRIMARY KEY (tenant, pseudonym))""",
        "CREATE INDEX pseudonyms_by_owner ON pseudonyms (tenant, owner_name)",
        """CREATE TABLE reidentifications (
            request_id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL,
            pseudonym TEXT NOT NULL,
            requested_by TEXT NOT NULL,
            approved_by TEXT,
            half_opened TEXT,
            expires_at DOUBLE PRECISION NOT NULL,
            revealed_at DOUBLE PRECISION)""",
    ),
)

#: Any number that no other program on a shared PostgreSQL server locks.
_ADVISORY_LOCK = 0x4847_4B45_5953


def migrate(connection: Connection) -> int:
    """Bring the database to this code's version, which is returned, in the caller's transaction.

    Safe when several processes start at once. Raises `KeyConfigurationError` if the database is
    newer.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _ADVISORY_LOCK})
    found, known = sql.migrate(connection, "key_table_version", MIGRATIONS)
    if found > known:
        raise KeyConfigurationError(
            f"expected a key table of version {known} or older, got version {found}; "
            "run the Havengate release that wrote it, or a newer one"
        )
    return known
