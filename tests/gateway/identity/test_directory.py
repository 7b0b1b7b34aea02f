"""Accounts, sessions and attempts: durable, private, and the same in every process at once."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import AccountError, DirectoryError, GatewayConfigurationError
from gateway.identity.accounts import normal_login
from gateway.identity.credentials import SESSION_COOKIE
from gateway.identity.database import DirectoryDatabase
from gateway.identity.model import Identified, NotIdentified
from gateway.identity.records import Grant, open_break_glass
from gateway.identity.revocations import Revocable
from gateway.identity.session_store import token_hash
from tests.gateway.identity.workbench import Bench, bench, head, route
from tests.postgres import running_postgres


@pytest.fixture
def two(tmp_path: Path, one: Bench) -> Iterator[Bench]:
    """Another process on the database of `one`."""
    made = bench(tmp_path, store=one.store, clock=one.clock, persons=one.persons)
    yield made
    made.identity.close()


async def _ask(where: Bench, token: str) -> Identified | NotIdentified:
    request = head("GET", "/", ("cookie", f"{SESSION_COOKIE}={token}"))
    return await where.identity.identifier.identify(request, route())


@pytest.mark.parametrize("how", ["end", "end_all", "reset", "lock"])
async def test_an_ended_session_is_refused_by_every_process_at_once(
    one: Bench, two: Bench, how: str
) -> None:
    account = one.clinician()
    token, session = one.identity.directory.sessions.begin(account.id, second_factor="totp")
    for where in (one, two, one, two):
        assert isinstance(await _ask(where, token), Identified)
    directory = two.identity.directory
    match how:
        case "end":
            directory.sessions.end(session.id)
        case "end_all":
            directory.sessions.end_all(account.id)
        case "reset":
            directory.accounts.reset(account.id, "x")
        case _:
            directory.accounts.lock(account.id)
    for where in (one, two):
        found = await _ask(where, token)
        assert isinstance(found, NotIdentified)
        assert (found.reason, found.credentials_given) == ("revoked", True)


async def test_what_was_open_before_a_lock_stays_closed_after_it(one: Bench, two: Bench) -> None:
    account = one.clinician()
    token = one.session(account)
    assert isinstance(await _ask(one, token), Identified)
    two.identity.directory.accounts.lock(account.id)
    assert isinstance(await _ask(one, token), NotIdentified)
    two.identity.directory.accounts.unlock(account.id)
    found = await _ask(one, token)
    assert isinstance(found, NotIdentified)


async def test_a_grant_counts_and_ends_in_every_process_at_once(one: Bench, two: Bench) -> None:
    account = one.clinician()
    token = one.session(account)
    await _ask(one, token)
    grant = two.identity.directory.grants.open(
        account.id, patient="3", reason="found unconscious", duration_s=600
    )
    found = await _ask(one, token)
    assert isinstance(found, Identified)
    assert found.break_glass is not None
    two.identity.directory.grants.end(account.id, grant.id)
    closed = await _ask(one, token)
    assert isinstance(closed, Identified)
    assert closed.break_glass is None


async def test_a_grant_ends_by_itself_without_anybody_writing(one: Bench) -> None:
    account = one.clinician()
    token = one.session(account)
    one.identity.directory.grants.open(
        account.id, patient="3", reason="found unconscious", duration_s=40
    )
    found = await _ask(one, token)
    assert isinstance(found, Identified)
    assert found.break_glass is not None
    one.clock.now += 41
    later = await _ask(one, token)
    assert isinstance(later, Identified)
    assert later.break_glass is None


async def test_a_session_known_from_before_costs_no_query(
    one: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = one.session(one.clinician())
    await _ask(one, token)
    monkeypatch.setattr(one.identity.directory.sessions, "load", None)
    assert isinstance(await _ask(one, token), Identified)


async def test_idle_and_old_sessions_end(one: Bench) -> None:
    account = one.clinician()
    token = one.session(account)
    one.clock.now += 1_801
    idle = await _ask(one, token)
    assert isinstance(idle, NotIdentified)
    assert idle.reason == "expired_token"
    token = one.session(account)
    for _ in range(25):
        one.clock.now += 1_700
        assert isinstance(await _ask(one, token), Identified)
    one.clock.now += 1_700
    old = await _ask(one, token)
    assert isinstance(old, NotIdentified)
    assert old.reason == "expired_token"


async def test_use_is_written_once_a_minute_at_most(one: Bench) -> None:
    token = one.session(one.clinician())
    version = one.identity.directory.database.version()
    for _ in range(50):
        one.clock.now += 1
        await _ask(one, token)
    assert one.identity.directory.database.version() == version
    one.clock.now += 10
    await _ask(one, token)
    assert one.identity.directory.database.version() != version


async def test_a_failing_database_lets_nobody_in(one: Bench, tmp_path: Path) -> None:
    token = one.session(one.clinician())
    await _ask(one, token)
    with closing(sqlite3.connect(tmp_path / "gateway.sqlite3")) as other:
        other.execute("DROP TABLE grants")
    with pytest.raises(DirectoryError):
        await _ask(one, token)


def test_the_database_is_closed_to_others(one: Bench, tmp_path: Path) -> None:
    one.account()
    for file in tmp_path.glob("gateway.sqlite3*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_no_token_is_kept(one: Bench) -> None:
    token = one.session(one.clinician())
    with one.identity.directory.database.reading() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM sessions").all()
    assert token_hash(token) in rows[0]
    assert token not in str(rows)


def test_a_newer_database_is_refused(one: Bench, tmp_path: Path) -> None:
    with one.identity.directory.database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO directory_version VALUES (99)")
    with pytest.raises(GatewayConfigurationError, match="version 99"):
        bench(tmp_path)


@pytest.mark.parametrize("url", ["", "sqlite://", "mysql://x/y", "no url"])
def test_other_databases_are_refused_without_showing_the_url(url: str) -> None:
    with pytest.raises(GatewayConfigurationError) as caught:
        DirectoryDatabase(url)
    assert "mysql" not in str(caught.value)


@given(st.text(max_size=40))
def test_a_name_has_one_form(name: str) -> None:
    assert normal_login(normal_login(name)) == normal_login(name)


@pytest.mark.parametrize("same", ["Ada", "ADA", " ada ", "ａｄａ"])  # noqa: RUF001
def test_names_that_look_the_same_are_one(one: Bench, same: str) -> None:
    one.account("ada")
    with pytest.raises(AccountError):
        one.account(same)


@pytest.mark.parametrize(
    "details",
    [{"patient": "Patient/3"}, {"patient": "../3"}, {"roles": frozenset({"Not A Role"})},
     {"references": frozenset({"Practitioner"})}, {"references": frozenset({"Patient/3"})},
     {"represents": frozenset({""})}],
)  # fmt: skip
def test_details_of_another_form_are_refused(one: Bench, details: dict[str, object]) -> None:
    with pytest.raises(AccountError):
        one.account("eve", **details)


def test_many_attempts_at_once_are_no_more_than_the_limit(one: Bench, two: Bench) -> None:
    def book(number: int) -> bool:
        where = one if number % 2 else two
        attempts = where.identity.directory.attempts
        return attempts.book("password", "ada", address=None) is not None

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(book, range(24))) == 5


def test_a_time_step_is_accepted_once_by_all_processes(one: Bench, two: Bench) -> None:
    account = one.clinician()

    def accept(number: int) -> bool:
        where = one if number % 2 else two
        return where.identity.directory.accounts.accept_counter(account.id, 77)

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(accept, range(12))) == 1
    assert not one.identity.directory.accounts.accept_counter(account.id, 76)


def test_a_revoked_session_cannot_be_renewed(one: Bench) -> None:
    account = one.clinician()
    sessions = one.identity.directory.sessions
    _, session = sessions.begin(account.id, second_factor="totp")
    sessions.end(session.id)
    with pytest.raises(AccountError):
        sessions.renew(session, second_factor="totp")
    with pytest.raises(AccountError):
        sessions.change_password(session, before=account.password_hash, password_hash="x")
    found = one.identity.directory.accounts.get(account.id)
    assert found == account


def test_the_lifetime_goes_on_when_a_session_is_renewed(one: Bench) -> None:
    account = one.clinician()
    sessions = one.identity.directory.sessions
    _, session = sessions.begin(account.id, second_factor="totp")
    one.clock.now += 500
    _, renewed = sessions.renew(session, second_factor="totp")
    assert renewed.began_at == session.began_at
    assert renewed.second_factor_at == session.second_factor_at + 500


def test_of_many_grants_only_so_many_are_open(one: Bench) -> None:
    account = one.clinician()
    grants = one.identity.directory.grants
    for number in range(5):
        grants.open(account.id, patient=str(number), reason="found unconscious", duration_s=60)
    with pytest.raises(AccountError):
        grants.open(account.id, patient="9", reason="found unconscious", duration_s=60)
    with pytest.raises(AccountError):
        grants.open(account.id, patient="9", reason="found unconscious", duration_s=14_401)


_TIMES = st.integers(min_value=0, max_value=1_000)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), _TIMES, _TIMES, st.text(max_size=12))),
    st.integers(min_value=0, max_value=1_200),
)
def test_no_patient_is_open_longer_than_was_granted(
    made: list[tuple[str, int, int, str]], now: int
) -> None:
    grants = tuple(
        Grant(
            id=str(number),
            account="x",
            patient=patient,
            reason=reason,
            begins_at=begins,
            ends_at=begins + lasts,
        )
        for number, (patient, begins, lasts, reason) in enumerate(made)
    )
    found = open_break_glass(grants, now)
    valid = [one for one in grants if one.begins_at <= now < one.ends_at]
    assert (found is not None) == bool(valid)
    if found is not None:
        assert found.begins_at <= now < found.ends_at
        for patient in found.patients:
            mine = [one for one in valid if one.patient == patient]
            assert found.ends_at <= max(one.ends_at for one in mine)
            assert len(found.reason.strip()) <= max(len(one.reason.strip()) for one in mine)


async def test_waiting_for_the_database_does_not_hold_up_others(one: Bench) -> None:
    token = one.session(one.clinician())
    first, second = await asyncio.gather(_ask(one, token), _ask(one, token))
    assert first == second


async def test_postgresql_keeps_the_same_promises(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        first = bench(tmp_path, url=url)
        second = bench(
            tmp_path, url=url, store=first.store, clock=first.clock, persons=first.persons
        )
        try:
            account = first.clinician()
            token, session = first.identity.directory.sessions.begin(
                account.id, second_factor="totp"
            )
            for where in (first, second):
                assert isinstance(await _ask(where, token), Identified)
            second.identity.directory.sessions.end(session.id)
            for where in (first, second):
                assert isinstance(await _ask(where, token), NotIdentified)
            test_many_attempts_at_once_are_no_more_than_the_limit(first, second)
            counters = [
                where.identity.directory.accounts.accept_counter(account.id, 99)
                for where in (first, second)
            ]
            assert counters == [True, False]
            revocations = first.identity.directory.revocations
            one = Revocable(token="j", subject="s", issued_at=first.clock.now)
            revocations.revoke("j", until=first.clock.now + 60)
            assert second.identity.directory.revocations.read(one)
            other = Revocable(token="k", subject="s", issued_at=first.clock.now)
            assert not second.identity.directory.revocations.read(other)
            revocations.revoke_subject("s", until=first.clock.now + 60)
            assert second.identity.directory.revocations.read(other)
            with pytest.raises(AccountError):
                second.account("ADA")
        finally:
            second.identity.close()
            first.identity.close()
