"""Second factors by time-based codes (RFC 6238: SHA-1, six digits, 30 seconds).

The seed is held by the key server alone, at `totp/<account id>`. A code counts once: the time step
that it belongs to must be later than every one accepted before, in all processes (RFC 6238 section
5.2). Attempts are counted by the caller, before a code is looked at.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import pyotp

from gateway.errors import AccountError, UnavailableError
from gateway.identity.accounts import Accounts
from gateway.identity.records import Account
from keys.ports import Clock

STEP_S: Final = 30
#: Steps before and after the present one that count, for clocks that differ.
_TOLERANCE: Final = 1
_DIGITS: Final = 6
ISSUER: Final = "Havengate"


class SecretStore(Protocol):
    """Secrets on the key server (`keys.kv.KVStore`)."""

    def read(self, path: str) -> dict[str, Any] | None:
        """The newest version, or None if there is nothing."""
        ...

    def write(self, path: str, values: dict[str, Any]) -> int:
        """Store a new version."""
        ...

    def delete(self, path: str) -> None:
        """Destroy all versions."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What a person types or scans into his authenticator, once."""

    secret: str = field(repr=False)
    uri: str = field(repr=False)


class SecondFactors:
    """Sets and checks second factors. Raises a `KeysError` when the key server is down."""

    def __init__(self, store: SecretStore, accounts: Accounts, *, clock: Clock) -> None:
        self._store = store
        self._accounts = accounts
        self._clock = clock

    async def enrol(self, account: Account, *, visit: str) -> Enrolment:
        """A seed that is not yet in use: the same in one visit, another in every other.

        Whoever learnt a first password early must not know the seed that its owner confirms.
        Raises `AccountError` for an account that has its second factor.
        """
        return await asyncio.to_thread(self.enrol_now, account, visit=visit)

    async def confirm(self, account: Account, code: str, *, visit: str) -> bool:
        """Take the seed that this visit was shown last into use if the code is right."""
        if not account.must_set_second_factor:
            raise AccountError("expected an account without a second factor, got one that has one")
        return await asyncio.to_thread(self._confirm, account, code, visit)

    async def check(self, account: Account, code: str) -> bool:
        """Whether a code is right and was never used. A right one is used up."""
        if account.must_set_second_factor:
            return False
        return await asyncio.to_thread(self._check, account, code)

    def enrol_now(self, account: Account, *, visit: str = "") -> Enrolment:
        """As `enrol`, blocking."""
        if not account.must_set_second_factor:
            raise AccountError("expected an account without a second factor, got one that has one")
        held = self._store.read(_path(account))
        # A seed that was in use and then reset may be known to whoever lost it.
        if held is None or not visit or not _is_shown_to(held, visit):
            held = {"seed": pyotp.random_base32(), "in_use": False, "visit": _name_of(visit)}
            self._store.write(_path(account), held)
        return _enrolment(account, str(held["seed"]))

    def issue_now(self, account: Account) -> Enrolment:
        """Set a seed without asking for a code, for whoever hands it over himself. Blocking."""
        enrolment = self.enrol_now(account)
        self._store.write(_path(account), {"seed": enrolment.secret, "in_use": True})
        self._accounts.second_factor_set(account.id)
        return enrolment

    def forget_now(self, account: Account) -> None:
        """Destroy the seed. Blocking."""
        self._store.delete(_path(account))

    def _confirm(self, account: Account, code: str, visit: str) -> bool:
        held = self._store.read(_path(account))
        if held is None or not _is_shown_to(held, visit) or not self._use_up(account, held, code):
            return False
        self._store.write(_path(account), {"seed": held["seed"], "in_use": True})
        self._accounts.second_factor_set(account.id)
        return True

    def _check(self, account: Account, code: str) -> bool:
        held = self._store.read(_path(account))
        if held is None or held.get("in_use") is not True:
            raise UnavailableError(
                "expected the seed of a second factor on the key server, got none in use; run "
                "`havengate users reset` for this account",
                "gateway.second_factor_missing",
            )
        return self._use_up(account, held, code)

    def _use_up(self, account: Account, held: dict[str, Any], code: str) -> bool:
        counter = _counter(str(held["seed"]), code, now=self._clock())
        return counter is not None and self._accounts.accept_counter(account.id, counter)


def _counter(seed: str, code: str, *, now: float) -> int | None:
    """The time step that a code belongs to, or None."""
    digits = "".join(code.split())
    if len(digits) != _DIGITS or not (digits.isascii() and digits.isdecimal()):
        return None
    codes, present = pyotp.HOTP(seed, digits=_DIGITS), int(now // STEP_S)
    found = None
    for counter in range(max(0, present - _TOLERANCE), present + _TOLERANCE + 1):
        if hmac.compare_digest(codes.at(counter), digits):
            found = counter
    return found


def _enrolment(account: Account, seed: str) -> Enrolment:
    totp = pyotp.TOTP(seed, digits=_DIGITS, interval=STEP_S)
    uri = totp.provisioning_uri(name=account.login, issuer_name=ISSUER)
    return Enrolment(secret=seed, uri=uri)


def _is_shown_to(held: dict[str, Any], visit: str) -> bool:
    return held.get("in_use") is False and held.get("visit") == _name_of(visit)


def _name_of(visit: str) -> str:
    return hashlib.sha256(visit.encode("utf-8", "surrogatepass")).hexdigest()


def _path(account: Account) -> str:
    return f"totp/{account.id}"
