"""`havengate users`: what it changes holds at once, and is in the log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from click.testing import Result
from typer.testing import CliRunner

from audit.errors import LogUnavailableError
from gateway.cli_users import UsersProgram, build
from gateway.errors import AccountError
from gateway.identity import passwords
from gateway.identity.bearer import BearerTokens
from gateway.identity.model import Identified
from gateway.identity.revocations import Revocations
from gateway.identity.service_accounts import hash_of
from gateway.settings import IdentityProviderSettings
from policies.model import ROLES
from tests.audit.records import make_recorder
from tests.gateway.identity.test_bearer import ISSUER, claims, provider, token
from tests.gateway.identity.workbench import PASSWORD, Bench, Browser


class Users:
    """Runs the commands on a gateway that is up."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.providers: tuple[IdentityProviderSettings, ...] = ()
        recorder = make_recorder(bench.log, bench.sealer)

        @contextmanager
        def open_program() -> Iterator[UsersProgram]:
            yield UsersProgram(
                directory=bench.identity.directory,
                kv=bench.store,
                sealer=bench.persons,
                recorder=recorder,
                tenant="clinic-1",
                actor="root",
                roles=ROLES,
                clock=bench.clock,
                providers=self.providers,
            )

        self.app = build(open_program)

    def run(self, *words: str, typed: str = "") -> Result:
        return CliRunner().invoke(self.app, words, input=typed)

    def json(self, *words: str) -> dict[str, object]:
        done = self.run(*words, "--json")
        assert done.exit_code == 0, done.output
        found: dict[str, object] = json.loads(done.stdout)
        return found


@pytest.fixture
def users(one: Bench, monkeypatch: pytest.MonkeyPatch) -> Users:
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(passwords, "rfc_9106_hasher", lambda: cheap)
    return Users(one)


async def test_who_was_added_can_sign_in(users: Users) -> None:
    words = ("add", "Ada", "--role", "clinician", "--reference", "Practitioner/7")
    made = users.json(*words, "--print-second-factor")
    assert (made["name"], made["roles"], made["second_factor_set"]) == ("ada", ["clinician"], True)
    assert "secret=" in str(made["second_factor_uri"])
    account = users.bench.identity.directory.accounts.named("ada")
    assert not account.must_set_second_factor
    browser = Browser(users.bench)
    page = await browser.get("sign-in")
    fields = {"login": "ada", "password": str(made["password"])}
    second = await browser.submit(page, "sign-in", **fields)
    done = await browser.submit(second, "sign-in/code", code=users.bench.code(account))
    assert done.head.status == 303
    acts = [(entry.action, entry.details.get("what")) for entry in users.bench.entries()]
    assert acts[:2] == [("admin", "users_add")] * 2


def test_a_password_is_printed_once_and_kept_nowhere(users: Users) -> None:
    shown = users.run("add", "ada", "--role", "nurse").stdout
    found = re.search(r"Password +(\S+)", shown)
    assert found is not None
    assert len(found[1]) >= 20
    assert found[1].encode() not in b"".join(users.bench.log.held)
    assert found[1] not in users.run("list", "--json").stdout


def test_a_chosen_password_is_asked_for_and_never_shown(users: Users) -> None:
    done = users.run("add", "ada", "--ask-password", typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert done.exit_code == 0
    assert PASSWORD not in done.output
    weak = users.run("add", "eve", "--ask-password", typed="password1234\npassword1234\n")
    assert isinstance(weak.exception, AccountError)
    assert users.bench.identity.directory.accounts.find("eve") is None


def test_unknown_roles_and_names_change_nothing(users: Users) -> None:
    assert isinstance(users.run("add", "ada", "--role", "clinican").exception, AccountError)
    assert isinstance(users.run("lock", "nobody").exception, AccountError)
    assert users.bench.identity.directory.accounts.all() == []
    assert users.bench.log.held == []


@pytest.mark.parametrize("command", ["lock", "sign-out", "reset"])
def test_what_takes_access_away_ends_sessions_at_once(users: Users, command: str) -> None:
    account = users.bench.clinician()
    users.bench.session(account)
    users.json(command, "ada")
    assert users.bench.identity.directory.sessions.of(account.id) == []
    assert [entry.outcome for entry in users.bench.entries()] == [None, "success"]
    assert len(users.bench.entries()[-1].patients) == 1


async def test_a_token_is_revoked_by_command_in_every_worker_and_written_down(
    users: Users, tmp_path: Path
) -> None:
    settings = provider(tmp_path)
    users.providers = (settings,)
    worker = BearerTokens(
        [settings],
        revocations=Revocations(users.bench.identity.directory.database, clock=users.bench.clock),
        clock=users.bench.clock,
    )
    plain, named, left = (
        token(claims(jti=jti, sub=sub))
        for jti, sub in ((None, "u-1"), ("t-1", "u-2"), (None, "u-3"))
    )
    for each in (plain, named, left):
        assert isinstance(await worker.identify(each), Identified)
    assert users.run("revoke-token", typed=f"{plain}\n").exit_code == 0
    assert users.run("revoke-token", "--jti", "t-1", "--issuer", ISSUER).exit_code == 0
    assert await worker.identify(plain) == await worker.identify(named) == "revoked"
    assert isinstance(await worker.identify(left), Identified)
    done = users.run("revoke-token", "--subject", "u-3")
    assert "lock the person there, too" in done.stdout
    assert await worker.identify(left) == "revoked"
    written = users.bench.entries()
    assert [(one.details["what"], one.outcome) for one in written] == [
        ("users_revoke_token", None), ("users_revoke_token", "success"),
        ("users_revoke_token", None), ("users_revoke_token", "success"),
        ("users_revoke_subject", None), ("users_revoke_subject", "success"),
    ]  # fmt: skip
    assert [len(one.patients) for one in written] == [1, 1, 0, 0, 1, 1]
    held = b"".join(users.bench.log.held)
    assert not any(one.encode() in held for one in (plain, "u-3", "t-1"))


@pytest.mark.parametrize(
    "words",
    [
        ("--subject", "u-1", "--issuer", "https://other.example"),
        ("--jti", "t-1", "--issuer", "https://other.example"),
        ("--subject", "u-1", "--jti", "t-1"),
        (),
    ],
)
def test_what_cannot_be_meant_revokes_nothing(
    users: Users, tmp_path: Path, words: tuple[str, ...]
) -> None:
    users.providers = (provider(tmp_path),)
    assert users.run("revoke-token", *words, typed="no token\n").exit_code != 0
    assert users.bench.log.held == []


def test_no_token_is_revoked_that_cannot_be_recorded(users: Users, tmp_path: Path) -> None:
    users.providers = (provider(tmp_path),)
    users.bench.log.fail = LogUnavailableError("away")
    for words in (("--subject", "u-1"), ("--jti", "t-1"), ()):
        done = users.run("revoke-token", *words, typed=f"{token(claims())}\n")
        assert isinstance(done.exception, LogUnavailableError)


def test_a_reset_forgets_password_and_second_factor(users: Users) -> None:
    account = users.bench.clinician()
    made = users.json("reset", "ada")
    assert f"totp/{account.id}" not in users.bench.store.held
    renewed = users.bench.identity.directory.accounts.named("ada")
    assert renewed.must_set_second_factor
    hasher = users.bench.identity.passwords
    assert not hasher._matches(renewed.password_hash, PASSWORD)
    assert hasher._matches(renewed.password_hash, str(made["password"]))


def test_unlocking_lets_in_and_forgets_attempts(users: Users) -> None:
    account = users.bench.clinician()
    attempts = users.bench.identity.directory.attempts
    for _ in range(5):
        attempts.book("password", "ada", address=None)
    users.json("lock", "ada")
    users.json("unlock", "ada")
    assert attempts.book("password", "ada", address=None) is not None
    assert users.bench.session(account)


@pytest.mark.parametrize("words", [("add", "eve"), ("reset", "ada"), ("unlock", "ada")])
def test_nothing_is_changed_that_cannot_be_recorded(users: Users, words: tuple[str, ...]) -> None:
    before = users.bench.clinician()
    users.bench.log.fail = LogUnavailableError("away")
    assert isinstance(users.run(*words).exception, LogUnavailableError)
    assert users.bench.identity.directory.accounts.all() == [before]


def test_a_program_gets_a_key_and_the_hash_for_its_file(users: Users) -> None:
    made = users.json("add", "lab-sync", "--service")
    assert made["key_sha256"] == hash_of(str(made["key"]))
    assert users.bench.identity.directory.accounts.all() == []
    assert "key_hash_file" in users.run("add", "lab-sync", "--service").stdout


def test_the_list_shows_who_may_sign_in(users: Users) -> None:
    users.bench.clinician()
    users.bench.account("eve", patient="3")
    shown = users.run("list").stdout.splitlines()
    assert "clinician" in shown[0]
    assert "patient 3" in shown[1]
    assert "second factor not set" in shown[1]


def test_emergency_access_is_shown_for_review_with_its_reason(users: Users) -> None:
    account = users.bench.clinician()
    grants = users.bench.identity.directory.grants
    grant = grants.open(account.id, patient="3", reason="found unconscious", duration_s=60)
    grants.end(account.id, grant.id)
    done = users.run("break-glass", "--json")
    (found,) = json.loads(done.stdout)
    assert (found["grant"], found["name"], found["patient"]) == (grant.id, "ada", "3")
    assert found["reason"] == "found unconscious"
    assert "found unconscious" in users.run("break-glass").stdout
    users.bench.clock.now += 8 * 86_400
    assert json.loads(users.run("break-glass", "--json").stdout) == []
