"""The key table in SQLite and in a real PostgreSQL: schema, files, fences, reservations."""

from __future__ import annotations

import resource
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import MetaData, create_engine, inspect, text

from keys import migrations
from keys.database import TERMS, KeyDatabase
from keys.errors import KeyConfigurationError, KeyTableError
from keys.model import KeyOwner, KeyRow
from keys.schema import metadata
from keys.table import EpochGoneError, KeyTable, Rewrapped
from tests.keys.workbench import database_files
from tests.postgres import running_postgres

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'deep' / 'er' / 'keys.sqlite3'}"
    found: str = request.getfixturevalue("postgres_url")
    engine = create_engine(found)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return found


@pytest.fixture
def database(url: str) -> Iterator[KeyDatabase]:
    opened = KeyDatabase(url)
    yield opened
    opened.close()


@pytest.fixture
def table(database: KeyDatabase) -> KeyTable:
    return KeyTable(database)


def make_row(key_id: str, owner: str = "tag", version: int = 1, epoch: int = 1) -> KeyRow:
    return KeyRow(
        key_id=key_id,
        kind="person",
        tenant="clinic-a",
        owner_name=owner,
        version=version,
        epoch=epoch,
        wrapped=f"vault:v{epoch}:wrapped-{key_id}",
        reserved=0,
        created_at=NOW,
    )


OWNER = KeyOwner("person", "clinic-a", "tag")


# --- Schema ---------------------------------------------------------------------------------------


def test_migrations_make_the_tables_that_the_code_expects(url: str, database: KeyDatabase) -> None:
    assert database is not None
    engine = create_engine(url)
    found = inspect(engine)
    for name, expected in metadata.tables.items():
        columns = {column["name"]: column for column in found.get_columns(name)}
        assert set(columns) == set(expected.columns.keys())
        for column in expected.columns:
            if not column.primary_key:
                assert columns[column.name]["nullable"] == column.nullable, (name, column.name)
        key = found.get_pk_constraint(name)["constrained_columns"]
        assert set(key) == {column.name for column in expected.primary_key}
    engine.dispose()


def test_opening_again_changes_nothing(url: str, table: KeyTable) -> None:
    table.insert([make_row("a")])
    again = KeyDatabase(url)
    assert KeyTable(again).by_ids(["a"]) == {"a": make_row("a")}
    again.close()


def test_refuses_a_table_that_is_newer_than_the_code(url: str) -> None:
    KeyDatabase(url).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO key_table_version (version) VALUES (99)"))
    engine.dispose()
    with pytest.raises(KeyConfigurationError, match="version 99"):
        KeyDatabase(url)


def test_a_migration_that_fails_leaves_nothing_behind(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (*migrations.MIGRATIONS, ("CREATE TABLE half_done (n BIGINT)", "NOT SQL"))
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "MIGRATIONS", broken)
        with pytest.raises(KeyTableError):
            KeyDatabase(url)
    engine = create_engine(url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    KeyDatabase(url).close()


def test_many_processes_may_migrate_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for opened in [pool.submit(KeyDatabase, url) for _ in range(6)]:
            opened.result().close()


def test_reflection_finds_no_table_without_a_definition(url: str, database: KeyDatabase) -> None:
    assert database is not None
    engine = create_engine(url)
    found = MetaData()
    found.reflect(engine)
    assert set(found.tables) == {*metadata.tables, "key_table_version"}
    engine.dispose()


# --- Files and URLs -------------------------------------------------------------------------------


def test_only_the_owner_may_read_the_files(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "keys.sqlite3"
    database = KeyDatabase(f"sqlite:///{path}")
    KeyTable(database).insert([make_row("a")])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    database.close()
    assert set(modes) >= {"keys.sqlite3", "keys.sqlite3-wal"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite3"
    path.touch(mode=0o644)
    KeyDatabase(f"sqlite:///{path}").close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_sqlite_syncs_every_commit_and_overwrites_what_it_deletes(tmp_path: Path) -> None:
    database = KeyDatabase(f"sqlite:///{tmp_path / 'keys.sqlite3'}")
    with database.reading() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete")
        }
    database.close()
    assert values == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}


@pytest.mark.parametrize("bad", ["", "keys.sqlite3", "sqlite://", "mysql://a:secret@b/c"])
def test_refuses_other_databases_without_repeating_the_url(bad: str) -> None:
    with pytest.raises(KeyConfigurationError) as caught:
        KeyDatabase(bad)
    assert "secret" not in str(caught.value)


def test_a_database_that_is_not_there_is_a_key_table_error(tmp_path: Path) -> None:
    with pytest.raises(KeyTableError):
        KeyDatabase(f"postgresql+psycopg://nobody:secret@/x?host={tmp_path}")


def test_a_file_that_is_no_database_is_a_key_table_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite3"
    path.write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(KeyTableError):
        KeyDatabase(f"sqlite:///{path}")


# --- Keys -----------------------------------------------------------------------------------------


def test_the_first_key_of_an_owner_stays(table: KeyTable) -> None:
    assert table.insert([make_row("a"), make_row("b", owner="other")]) == ["a", "b"]
    assert table.insert([make_row("c"), make_row("d", owner="third")]) == ["d"]
    assert table.newest([OWNER])[OWNER].key_id == "a"


def test_many_writers_of_one_first_key_end_with_one(url: str) -> None:
    databases = [KeyDatabase(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        stored = [
            future.result()
            for future in [
                pool.submit(KeyTable(database).insert, [make_row(f"k{number}")])
                for number, database in enumerate(databases)
            ]
        ]
    for database in databases:
        database.close()
    assert sorted(len(ids) for ids in stored) == [0, 0, 0, 1]


def test_finds_more_rows_than_a_statement_can_name(table: KeyTable) -> None:
    rows = [make_row(f"k{number}", owner=f"tag{number}") for number in range(6000)]
    table.insert(rows)
    assert len(table.by_ids([row.key_id for row in rows])) == 6000
    owners = [KeyOwner("person", "clinic-a", f"tag{number}") for number in range(6000)]
    assert len(table.newest(owners)) == 6000


def test_reservations_of_many_writers_never_pass_the_budget(url: str) -> None:
    databases = [KeyDatabase(url) for _ in range(3)]
    tables = [KeyTable(database) for database in databases]
    tables[0].insert([make_row("a")])

    def work(table: KeyTable) -> int:
        granted = 0
        while table.reserve("a", 7, budget=100, now=NOW):
            granted += 7
        return granted

    with ThreadPoolExecutor(3) as pool:
        granted = sum(future.result() for future in [pool.submit(work, table) for table in tables])
    row = tables[0].by_ids(["a"])["a"]
    for database in databases:
        database.close()
    assert granted == row.reserved == 98
    assert row.retired_at == NOW


def test_a_retired_or_erased_key_grants_nothing(table: KeyTable) -> None:
    table.insert([make_row("a"), make_row("b", owner="other")])
    table.retire("a", now=NOW)
    table.destroy(["b"], now=NOW)
    assert not table.reserve("a", 1, budget=100, now=NOW)
    assert not table.reserve("b", 1, budget=100, now=NOW)


def test_destroying_forgets_the_wrapped_key_and_whose_it_was(table: KeyTable) -> None:
    before = table.generation()
    table.insert([make_row("a")])
    assert table.destroy(["a", "unknown"], now=NOW) == ["a"]
    row = table.by_ids(["a"])["a"]
    assert (row.wrapped, row.owner_name, row.epoch, row.erased_at) == (None, None, None, NOW)
    assert table.generation() > before
    assert table.destroy(["a"], now=NOW) == []
    assert table.newest([OWNER]) == {}


def test_the_database_itself_refuses_a_live_key_without_an_owner(database: KeyDatabase) -> None:
    KeyTable(database).insert([make_row("a")])
    with pytest.raises(KeyTableError), database.writing() as connection:
        connection.execute(text("UPDATE data_keys SET owner_name = NULL"))
    with pytest.raises(KeyTableError), database.writing() as connection:
        connection.execute(text("UPDATE data_keys SET erased_at = 1"))


# --- Epochs ---------------------------------------------------------------------------------------


def test_a_rewrapping_never_brings_an_erased_key_back(table: KeyTable) -> None:
    table.insert([make_row("a")])
    change = Rewrapped(key_id="a", old="vault:v1:wrapped-a", new="vault:v2:wrapped-a", epoch=2)
    table.destroy(["a"], now=NOW)
    assert table.replace([change]) == 0
    assert table.by_ids(["a"])["a"].wrapped is None


def test_a_rewrapping_never_overwrites_a_newer_one(table: KeyTable) -> None:
    table.insert([make_row("a")])
    newer = Rewrapped(key_id="a", old="vault:v1:wrapped-a", new="vault:v3:x", epoch=3)
    older = Rewrapped(key_id="a", old="vault:v1:wrapped-a", new="vault:v2:x", epoch=2)
    assert table.replace([newer]) == 1
    assert table.replace([older]) == 0
    assert table.by_ids(["a"])["a"].epoch == 3


def test_no_key_gets_behind_the_fence(table: KeyTable) -> None:
    table.insert([make_row("a", epoch=1)])
    assert table.fence(2) == 1
    table.insert([make_row("b", owner="other", epoch=1)])  # the fence did not stand
    table.destroy(["a", "b"], now=NOW)
    assert table.fence(2) == 0
    with pytest.raises(EpochGoneError):
        table.insert([make_row("c", epoch=1)])
    assert table.insert([make_row("d", epoch=2)]) == ["d"]


def test_a_fence_is_never_lowered(table: KeyTable) -> None:
    table.fence(5)
    table.fence(3)
    with pytest.raises(EpochGoneError):
        table.insert([make_row("a", epoch=4)])


def test_writers_that_race_a_fence_are_never_left_behind_it(url: str) -> None:
    """Whatever the order: a key of an old epoch is stored, or the fence stands. Never both."""
    databases = [KeyDatabase(url) for _ in range(2)]
    writer, fencer = (KeyTable(database) for database in databases)

    def write(number: int) -> bool:
        try:
            writer.insert([make_row(f"k{number}", owner=f"t{number}", epoch=number)])
        except EpochGoneError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for number in range(1, 40):
            stored = pool.submit(write, number)
            stands = pool.submit(fencer.fence, number + 1)
            assert stored.result() != (stands.result() == 0)
            fencer.destroy([f"k{number}"], now=NOW)
    for database in databases:
        database.close()


def test_pages_visit_every_live_key_once(table: KeyTable) -> None:
    table.insert([make_row(f"k{n}", owner=f"t{n}", epoch=1 + n % 2) for n in range(25)])
    table.destroy(["k3"], now=NOW)
    seen: list[str] = []
    while page := table.page(after=seen[-1] if seen else "", limit=4):
        seen += [row.key_id for row in page]
    assert sorted(seen) == sorted(f"k{n}" for n in range(25) if n != 3)
    assert len(table.page(after="", limit=100, below_epoch=2)) == 12 + 1


# --- What is left on the disk ---------------------------------------------------------------------


def test_nothing_of_an_erased_key_is_left_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite3"
    database = KeyDatabase(f"sqlite:///{path}")
    table = KeyTable(database)
    # Enough rows for free pages and overflow to appear.
    rows = [make_row(f"key-{n}-", owner=f"<owner-{n}>") for n in range(500)]
    table.insert(rows)
    table.replace(
        [
            Rewrapped(key_id=row.key_id, old=row.wrapped or "", new=f"vault:v2:new-{n}-", epoch=2)
            for n, row in enumerate(rows)
        ]
    )
    assert any(b"new-7-" in content for content in database_files(path).values())
    table.destroy([row.key_id for row in rows[:250]], now=NOW)
    database.scrub()
    for name, content in database_files(path).items():
        for n in range(250):
            assert f"wrapped-key-{n}-".encode() not in content, name
            assert f"new-{n}-".encode() not in content, name
            assert f"<owner-{n}>".encode() not in content, name
    assert any(b"new-400-" in content for content in database_files(path).values())
    database.close()


def test_scrubbing_says_so_when_a_reader_prevents_it(
    tmp_path: Path,
) -> None:
    terms = replace(TERMS, busy_timeout_s=0.01)
    database = KeyDatabase(f"sqlite:///{tmp_path / 'keys.sqlite3'}", terms)
    table = KeyTable(database)
    table.insert([make_row("a")])
    with database.reading() as reader:
        reader.execute(text("SELECT count(*) FROM data_keys")).scalar()
        table.destroy(["a"], now=NOW)
        with pytest.raises(KeyTableError, match="reader"):
            database.scrub()
    database.scrub()
    database.close()


def test_a_scrub_that_the_disk_refuses_is_one_of_our_errors(tmp_path: Path) -> None:
    """The erasure is then repeated, not ended by an error that nobody expects."""
    path = tmp_path / "keys.sqlite3"
    database = KeyDatabase(f"sqlite:///{path}")
    KeyTable(database).insert([make_row(f"key-{n}-") for n in range(500)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The table's file may not grow to take in what stands in the log.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
        with pytest.raises(KeyTableError):
            database.scrub()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    database.scrub()
    database.close()


def test_a_lock_that_is_never_released_is_an_error_not_a_hang(url: str) -> None:
    KeyDatabase(url).close()
    database = KeyDatabase(url, replace(TERMS, busy_timeout_s=1))
    holder = KeyDatabase(url)
    try:
        with holder.writing() as connection:
            connection.execute(text("UPDATE key_state SET generation = generation + 1"))
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(KeyTable(database).insert, [make_row("a")])
                try:
                    with pytest.raises(KeyTableError):
                        waiting.result(30)
                finally:
                    connection.rollback()
    finally:
        database.close()
        holder.close()
