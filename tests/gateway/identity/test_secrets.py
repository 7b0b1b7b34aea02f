"""Passwords, second factors, keys of programs, and secrets that processes share."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyotp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import AccountError, GatewayConfigurationError, UnavailableError
from gateway.identity.passwords import Passwords, check_new_password, rfc_9106_hasher
from gateway.identity.service_accounts import ServiceAccounts, hash_of, make_key
from gateway.identity.shared_secret import SharedSecret
from gateway.settings import ServiceAccountSettings
from tests.gateway.identity.workbench import PASSWORD, Bench, cheap_passwords


def test_passwords_are_hashed_as_rfc_9106_recommends() -> None:
    hashed = Passwords().hash_now(PASSWORD)
    assert hashed.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert not rfc_9106_hasher().check_needs_rehash(hashed)


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_a_password_matches_itself_alone(right: str, other: str) -> None:
    passwords = cheap_passwords()
    hashed = passwords.hash_now(right)
    assert passwords._matches(hashed, right)
    assert not passwords._matches(None, right)
    assert not passwords._matches("", right)
    assert passwords._matches(hashed, right + "x") is False
    passwords.close()


async def test_two_hashes_run_at_once_and_no_more() -> None:
    passwords = cheap_passwords()
    assert passwords._threads._max_workers == 2
    assert await asyncio.gather(*(passwords.matches(None, "x") for _ in range(9))) == [False] * 9
    passwords.close()


@pytest.mark.parametrize(
    "password",
    ["short", "elevenchars", "passwordpassword", "Password1234!", "aaaaaaaaaaaaaaa",
     "letmein123456",
     "qwertyuiop123", "123456789012345", "havengate-2026", "ada.lovelace1234", "abcabcabcabcabc",
     "Welcome123456789", "x" * 257],
)  # fmt: skip
def test_passwords_that_are_guessed_first_are_refused(password: str) -> None:
    with pytest.raises(AccountError) as caught:
        check_new_password(password, login="ada.lovelace@clinic.example")
    assert password not in str(caught.value)


@pytest.mark.parametrize(
    "password", [PASSWORD, "correct mule battery lemon", "12 Ölfässer im Keller", "x8#kQ!vR2mZp"]
)
def test_long_passwords_need_no_rules(password: str) -> None:
    check_new_password(password, login="ada")


async def test_a_code_is_accepted_a_step_early_or_late_and_no_more(one: Bench) -> None:
    account = one.clinician()
    factors = one.identity.pages.sign_in.second_factors
    codes = pyotp.HOTP(str(one.store.held[f"totp/{account.id}"]["seed"]))
    present = int(one.clock.now // 30)
    for offset, right in ((-2, False), (2, False), (-1, True), (0, True), (1, True), (0, False)):
        assert await factors.check(account, codes.at(present + offset)) is right, offset


@pytest.mark.parametrize(
    "code",
    ["", "12345", "1234567", "abcdef", "\uff11" * 6, "-12345", "0" * 9],
)
async def test_what_is_no_code_is_refused(one: Bench, code: str) -> None:
    account = one.clinician()
    assert not await one.identity.pages.sign_in.second_factors.check(account, code)


async def test_a_seed_that_is_gone_lets_nobody_in(one: Bench) -> None:
    account = one.clinician()
    code = one.code(account)
    one.store.held.clear()
    with pytest.raises(UnavailableError):
        await one.identity.pages.sign_in.second_factors.check(account, code)


async def test_a_seed_that_is_not_confirmed_does_not_count(one: Bench) -> None:
    account = one.account()
    factors = one.identity.pages.sign_in.second_factors
    enrolment = await factors.enrol(account, visit="v")
    assert not await factors.check(account, pyotp.TOTP(enrolment.secret).now())
    assert await factors.enrol(account, visit="v") == enrolment
    with pytest.raises(UnavailableError):
        await factors.check(replace(account, must_set_second_factor=False), "123456")
    assert "secret" not in repr(enrolment)


async def test_after_a_reset_the_old_seed_is_not_shown_again(one: Bench) -> None:
    account = one.clinician()
    old = one.store.held[f"totp/{account.id}"]["seed"]
    one.identity.directory.accounts.reset(account.id, account.password_hash)
    renewed = one.identity.directory.accounts.named("ada")
    enrolment = await one.identity.pages.sign_in.second_factors.enrol(renewed, visit="v")
    assert enrolment.secret != old


def _service(tmp_path: Path, key: str, **more: object) -> ServiceAccountSettings:
    path = tmp_path / "key.sha256"
    path.write_text(hash_of(key) + "\n")
    path.chmod(0o600)
    return ServiceAccountSettings(name="lab-sync", key_hash_file=str(path), **more)  # type: ignore[arg-type]


def test_a_program_is_known_by_its_key_alone(tmp_path: Path) -> None:
    key, hashed = make_key("lab-sync")
    assert hashed == hash_of(key)
    services = ServiceAccounts([_service(tmp_path, key, scopes=("system/Patient.r",))])
    found = services.identify(key)
    assert found is not None
    assert (found.principal.kind, found.person) == ("service", "lab-sync")
    assert found.principal.scopes == frozenset({"system/Patient.r"})
    other, _ = make_key("lab-sync")
    unknown, _ = make_key("lab")
    for wrong in (other, unknown, key[:-1], key + "x", "hgs_lab-sync_", "hgs_", hashed):
        assert services.identify(wrong) is None


def test_a_program_without_scopes_may_do_nothing(tmp_path: Path) -> None:
    key, _ = make_key("lab-sync")
    found = ServiceAccounts([_service(tmp_path, key)]).identify(key)
    assert found is not None
    assert found.principal.scopes == frozenset()


def test_a_replaced_key_counts_at_the_next_request(tmp_path: Path) -> None:
    old, _ = make_key("lab-sync")
    services = ServiceAccounts([_service(tmp_path, old)])
    assert services.identify(old) is not None
    new, _ = make_key("lab-sync")
    _service(tmp_path, new)
    assert services.identify(old) is None
    assert services.identify(new) is not None


def test_a_key_file_open_to_others_lets_nobody_in(tmp_path: Path) -> None:
    key, _ = make_key("lab-sync")
    account = _service(tmp_path, key)
    services = ServiceAccounts([account])
    Path(account.key_hash_file).chmod(0o644)
    with pytest.raises(UnavailableError):
        services.identify(key)
    with pytest.raises(GatewayConfigurationError):
        ServiceAccounts([account])


def test_a_key_in_place_of_its_hash_is_refused_and_not_shown(tmp_path: Path) -> None:
    key, _ = make_key("lab-sync")
    account = _service(tmp_path, key)
    Path(account.key_hash_file).write_text(key)
    with pytest.raises(GatewayConfigurationError) as caught:
        ServiceAccounts([account])
    assert key not in str(caught.value)


@pytest.mark.parametrize("name", ["", "Lab", "lab_sync", "-lab", "lab-", "a" * 25, "lab sync"])
def test_names_that_the_log_would_not_take_are_refused(name: str) -> None:
    with pytest.raises(AccountError):
        make_key(name)


def test_processes_that_start_at_once_share_one_secret(one: Bench) -> None:
    database = one.identity.directory.database
    with ThreadPoolExecutor(6) as threads:
        made = list(
            threads.map(lambda _: SharedSecret.open(one.store, "new", database).mac("x"), range(12))
        )
    assert len(set(made)) == 1


@given(st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_codes_tell_apart_where_one_part_ends(first: list[str], second: list[str]) -> None:
    secret = SharedSecret(b"k" * 32)
    same = secret.mac("label", *first) == secret.mac("label", *second)
    assert same == (first == second)
    assert secret.matches(secret.mac("label", *first), "label", *first)
    assert not secret.matches(secret.mac("label", *first), "other", *first)
