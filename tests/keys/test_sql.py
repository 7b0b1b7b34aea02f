from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from keys.errors import KeyConfigurationError, KeyTableError
from keys.sql import SqlDatabase, Terms, migrate

TERMS = Terms(
    setting="some.url", what="the table", wrong=KeyConfigurationError, failed=KeyTableError
)
MIGRATIONS = (("CREATE TABLE things (name TEXT)",), ("ALTER TABLE things ADD COLUMN size INT",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new.sqlite3"


def test_waits_for_whoever_opens_a_new_file_at_the_same_time(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    database = SqlDatabase(f"sqlite:///{path}", TERMS)

    def modes() -> object:
        with database.reading() as connection:
            return connection.execute(text("PRAGMA journal_mode")).scalar()

    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(modes)
        # SQLite itself would have failed at once.
        with pytest.raises(NotYetError):
            opening.result(0.3)
        other.rollback()
        assert opening.result(30) == "wal"
    other.close()
    database.close()


def test_does_not_wait_for_ever(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    database = SqlDatabase(f"sqlite:///{path}", replace(TERMS, busy_timeout_s=0.05))
    with pytest.raises(KeyTableError, match="OperationalError"), database.reading():
        pass
    other.close()
    database.close()


def test_what_is_no_database_is_told_at_once(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    database = SqlDatabase(f"sqlite:///{path}", replace(TERMS, busy_timeout_s=3600))
    with pytest.raises(KeyTableError), database.reading():
        pass
    database.close()


def test_migrates_what_is_missing_and_nothing_twice(path: Path) -> None:
    database = SqlDatabase(f"sqlite:///{path}", TERMS)
    with database.writing() as connection:
        assert migrate(connection, "version", MIGRATIONS[:1]) == (0, 1)
    with database.writing() as connection:
        assert migrate(connection, "version", MIGRATIONS) == (1, 2)
        connection.execute(text("INSERT INTO things (name, size) VALUES ('a', 1)"))
    with database.writing() as connection:
        assert migrate(connection, "version", MIGRATIONS) == (2, 2)
    database.close()


def test_leaves_a_newer_database_as_it_is(path: Path) -> None:
    database = SqlDatabase(f"sqlite:///{path}", TERMS)
    with database.writing() as connection:
        migrate(connection, "version", MIGRATIONS)
    with database.writing() as connection:
        assert migrate(connection, "version", MIGRATIONS[:1]) == (2, 1)
    database.close()


@pytest.mark.parametrize(
    "url", ["", "sqlite://", "sqlite:///:memory:", "mysql://user:secret@host/x", "no url secret"]
)
def test_refuses_other_urls_without_repeating_them(url: str) -> None:
    with pytest.raises(KeyConfigurationError, match=r"some\.url") as caught:
        SqlDatabase(url, TERMS)
    assert "secret" not in str(caught.value)
