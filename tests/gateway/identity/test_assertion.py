"""The statement for the app: true, short-lived, pairwise, and seldom asked of Vault."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import jwt
import pytest

from gateway.errors import UnavailableError
from gateway.identity import assertion
from gateway.identity.assertion import Assertions
from gateway.identity.model import Identified
from gateway.identity.shared_secret import SharedSecret
from keys.errors import VaultUnavailableError
from keys.kv import KVStore
from keys.layout import IDENTITY_SIGNING_KEY
from keys.signing import VaultSigner
from keys.vault import VaultClient
from policies.model import Assurance, Principal
from tests.audit.conftest import MemorySigner
from tests.gateway.identity.workbench import START, Bench, Clock, route

ISSUER = "https://clinic.example"
ADA = Identified(
    principal=Principal(
        kind="user",
        id="account/1",
        roles=frozenset({"clinician"}),
        assurance=Assurance(second_factor="totp", second_factor_at=START),
    ),
    means="session",
    person="Practitioner/7",
    purpose="TREAT",
    session="s1",
    claims={"auth_time": str(int(START)), "iss": "https://evil.example", "sub": "root"},
)


def _assertions(signer: MemorySigner, clock: Clock | None = None) -> Assertions:
    secret = SharedSecret(b"k" * 32)
    return Assertions(signer, issuer=ISSUER, pairwise=secret, clock=clock or Clock())


async def _read(
    assertions: Assertions, statement: bytes, audience: str = "ehr"
) -> dict[str, object]:
    """Verify as an app does, with a library that is not ours."""
    keys = jwt.PyJWKSet.from_dict(json.loads(await assertions.jwks()))
    kid = jwt.get_unverified_header(statement)["kid"]
    return jwt.decode(
        statement,
        keys[kid],
        algorithms=["EdDSA"],
        audience=audience,
        issuer=ISSUER,
        options={"verify_exp": False, "verify_iat": False},
    )


async def test_an_app_can_verify_who_asks() -> None:
    assertions = _assertions(MemorySigner())
    found = await _read(assertions, await assertions.statement(route(), ADA))
    assert found["roles"] == ["clinician"]
    assert (found["purpose"], found["acr"]) == ("TREAT", "totp")
    assert (found["iat"], found["exp"]) == (START, START + 300)
    assert found["auth_time"] == START
    assert "patient" not in found
    assert "Practitioner/7" not in str(found)


async def test_only_a_patient_is_named_as_one() -> None:
    assertions = _assertions(MemorySigner())
    eve = replace(ADA, principal=Principal(kind="user", id="account/2", patient="3"))
    assert (await _read(assertions, await assertions.statement(route(), eve)))["patient"] == "3"


async def test_a_person_has_another_name_for_each_app_and_always_the_same() -> None:
    first, second = _assertions(MemorySigner()), _assertions(MemorySigner())
    names = [
        (await _read(where, await where.statement(route(name), ADA), name))["sub"]
        for where in (first, second)
        for name in ("ehr", "forum")
    ]
    assert names[0] == names[2]
    assert names[1] == names[3]
    assert names[0] != names[1]


async def test_vault_signs_once_for_many_requests_at_once() -> None:
    signer, clock = MemorySigner(), Clock()
    assertions = _assertions(signer, clock)
    made = await asyncio.gather(*(assertions.statement(route(), ADA) for _ in range(50)))
    assert (len(set(made)), len(signer.signed)) == (1, 1)
    clock.now += 239
    await assertions.statement(route(), ADA)
    assert len(signer.signed) == 1
    clock.now += 1
    await assertions.statement(route(), ADA)
    assert len(signer.signed) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"session": "s2"},
        {"person": "Practitioner/8"},
        {"purpose": "HOPERAT"},
        {"principal": replace(ADA.principal, roles=frozenset({"nurse"}))},
        {"principal": replace(ADA.principal, patient="3")},
        {"principal": replace(ADA.principal, assurance=Assurance())},
        {"claims": {"auth_time": "5"}},
    ],
)
async def test_a_statement_is_never_used_for_anybody_or_anything_else(
    change: dict[str, object],
) -> None:
    signer = MemorySigner()
    assertions = _assertions(signer)
    first = await assertions.statement(route(), ADA)
    other = await assertions.statement(route(), replace(ADA, **change))  # type: ignore[arg-type]
    assert first != other
    assert len(signer.signed) == 2


async def test_without_vault_there_is_no_statement_and_later_there_is() -> None:
    signer = MemorySigner()
    assertions = _assertions(signer)
    signer.away = True
    for _ in range(2):
        with pytest.raises(VaultUnavailableError):
            await assertions.statement(route(), ADA)
    signer.away = False
    assert await assertions.statement(route(), ADA)


async def test_who_goes_away_does_not_take_the_statement_from_others() -> None:
    assertions = _assertions(MemorySigner())
    first = asyncio.create_task(assertions.statement(route(), ADA))
    second = asyncio.create_task(assertions.statement(route(), ADA))
    await asyncio.sleep(0)
    first.cancel()
    assert await second


async def test_statements_of_a_key_before_the_newest_still_verify() -> None:
    signer, clock = MemorySigner(), Clock()
    assertions = _assertions(signer, clock)
    old = await assertions.statement(route(), ADA)
    signer.rotate()
    clock.now += 241
    new = await assertions.statement(route(), ADA)
    kids = {jwt.get_unverified_header(one)["kid"] for one in (old, new)}
    assert len(kids) == 2
    for statement in (old, new):
        await _read(assertions, statement)


async def test_a_version_that_is_not_the_newest_is_not_used() -> None:
    class Behind(MemorySigner):
        def sign(self, message: bytes) -> tuple[int, bytes]:
            return 1, super().sign(message)[1]

    signer = Behind()
    signer.rotate()
    with pytest.raises(UnavailableError):
        await _assertions(signer).statement(route(), ADA)


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assertion, "_MAX_KEPT", 8)
    assertions = _assertions(MemorySigner())
    for number in range(40):
        await assertions.statement(route(), replace(ADA, session=str(number)))
    assert len(assertions._kept) == 8


async def test_the_real_key_server_signs_and_keeps_the_secrets(
    one: Bench, vault: Callable[[str], VaultClient]
) -> None:
    client = vault("gateway")
    store = KVStore(client, "gateway")
    database = one.identity.directory.database
    secret = SharedSecret.open(store, "identity/test-pairwise", database)
    again = SharedSecret.open(store, "identity/test-pairwise", database)
    assert secret.mac("x") == again.mac("x")
    signer = VaultSigner(client, IDENTITY_SIGNING_KEY)
    assertions = Assertions(signer, issuer=ISSUER, pairwise=secret, clock=one.clock)
    found = await _read(assertions, await assertions.statement(route(), ADA))
    assert found["aud"] == "ehr"
    factors = one.identity.pages.sign_in.second_factors
    real = type(factors)(store, one.identity.directory.accounts, clock=one.clock)
    account = one.account()
    enrolment = real.issue_now(account)
    assert store.read(f"totp/{account.id}") == {"seed": enrolment.secret, "in_use": True}
    real.forget_now(account)
    assert store.read(f"totp/{account.id}") is None
