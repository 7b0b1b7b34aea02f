"""Identity as tests use it: a real directory, cheap hashes, a log and a vault in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyotp
from argon2 import PasswordHasher

from audit.entry import parse_entry
from audit.model import Entry
from audit.recorder import AsyncRecorder
from gateway.core.commands import Fetched
from gateway.core.messages import Headers, RequestHead
from gateway.identity.passwords import Passwords
from gateway.identity.reasons import PersonSealer
from gateway.identity.records import Account
from gateway.identity.wiring import Identity
from gateway.routes import Route
from gateway.settings import IdentitySettings, RouteSettings, SessionSettings
from keys.errors import VaultUnavailableError
from tests.audit.conftest import MemorySigner
from tests.audit.records import LocalSealer, MemoryLog, make_async_recorder
from tests.gateway.fhir.sealers import MemorySealer

START = 1_800_000_000.0
PASSWORD = "three quiet otters sing"
HOST = "clinic.example"
OWN = "/.havengate/"


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class MemoryStore:
    """Secrets in memory, in place of the key server's."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}
        self.away = False

    def read(self, path: str) -> dict[str, Any] | None:
        self._answer()
        found = self.held.get(path)
        return None if found is None else dict(found)

    def write(self, path: str, values: dict[str, Any]) -> int:
        self._answer()
        self.held[path] = dict(values)
        return 1

    def delete(self, path: str) -> None:
        self._answer()
        self.held.pop(path, None)

    def _answer(self) -> None:
        if self.away:
            raise VaultUnavailableError("The key server is away, as the test wants it.")


def cheap_passwords() -> Passwords:
    return Passwords(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


def route(name: str = "ehr") -> Route:
    settings = RouteSettings(name=name, kind="ehr", upstream="http://127.0.0.1:1")
    return Route(
        settings=settings,
        name=name,
        base="",
        upstream_scheme="http",
        upstream_authority="127.0.0.1:1",
        upstream_base="",
    )


def head(
    method: str = "GET",
    path: str = "/",
    *fields: tuple[str, str],
    query: str = "",
    authority: str = HOST,
    client: str | None = "192.0.2.7",
) -> RequestHead:
    return RequestHead(
        method=method,
        authority=authority,
        path=path,
        query=query,
        headers=Headers(fields),
        client=client,
    )


@dataclass
class Bench:
    """Everything of one gateway process."""

    identity: Identity
    clock: Clock
    store: MemoryStore
    persons: PersonSealer
    signer: MemorySigner
    log: MemoryLog
    sealer: LocalSealer
    recorder: AsyncRecorder

    def account(self, login: str = "ada", **details: Any) -> Account:
        """An account with password `PASSWORD` and its second factor still to be set."""
        hashed = self.identity.passwords.hash_now(PASSWORD)
        return self.identity.directory.accounts.add(login=login, password_hash=hashed, **details)

    def clinician(self, login: str = "ada") -> Account:
        """A clinician with a second factor."""
        made = self.account(
            login, roles=frozenset({"clinician"}), references=frozenset({"Practitioner/7"})
        )
        return self.enrolled(made)

    def enrolled(self, account: Account) -> Account:
        self.identity.pages.sign_in.second_factors.issue_now(account)
        found = self.identity.directory.accounts.get(account.id)
        assert found is not None
        return found

    def code(self, account: Account) -> str:
        """The code of now; the clock goes on first, because a code counts once."""
        self.clock.now += 30
        seed = str(self.store.held[f"totp/{account.id}"]["seed"])
        return pyotp.HOTP(seed).at(int(self.clock.now // 30))

    def session(self, account: Account) -> str:
        """The token of a new session."""
        token, _ = self.identity.directory.sessions.begin(account.id, second_factor="totp")
        return token

    def entries(self) -> list[Entry]:
        return [parse_entry(raw) for raw in self.log.held]


def bench(
    directory: Path,
    *,
    store: MemoryStore | None = None,
    clock: Clock | None = None,
    url: str | None = None,
    persons: PersonSealer | None = None,
    **settings: Any,
) -> Bench:
    """A gateway process with its database in `directory`."""
    log, sealer, signer = MemoryLog(), LocalSealer(), MemorySigner()
    recorder = make_async_recorder(log, sealer)
    persons = persons or MemorySealer()
    kept, now = store or MemoryStore(), clock or Clock()
    settings.setdefault("sessions", SessionSettings())
    identity = Identity.open(
        IdentitySettings(
            database_url=url or f"sqlite:///{directory / 'gateway.sqlite3'}", **settings
        ),
        store=kept,
        sealer=persons,
        signer=signer,
        recorder=recorder,
        tenant="clinic-1",
        public_url=f"https://{HOST}",
        clock=now,
        passwords=cheap_passwords(),
    )
    return Bench(
        identity=identity,
        clock=now,
        store=kept,
        persons=persons,
        signer=signer,
        log=log,
        sealer=sealer,
        recorder=recorder,
    )


@dataclass
class Browser:
    """Keeps cookies, and sends forms as a browser on the same host does."""

    bench: Bench
    cookies: dict[str, str] = field(default_factory=dict)
    site: str | None = "same-origin"
    client: str = "192.0.2.7"

    async def get(self, name: str, query: str = "") -> Fetched:
        return await self._send("GET", name, query=query)

    async def post(self, name: str, fields: dict[str, str]) -> Fetched:
        return await self._send("POST", name, body=urlencode(fields).encode())

    async def submit(self, page: Fetched, action: str, **fields: str) -> Fetched:
        """Fill the form of a page that goes to `action`."""
        return await self.post(action, hidden(page, action) | fields)

    async def sign_in(self, account: Account, next_: str = "") -> Fetched:
        page = await self.get("sign-in", urlencode({"next": next_}))
        second = await self.submit(page, "sign-in", login=account.login, password=PASSWORD)
        return await self.submit(second, "sign-in/code", code=self.bench.code(account))

    async def _send(self, method: str, name: str, *, query: str = "", body: bytes = b"") -> Fetched:
        fields = [("cookie", f"{key}={value}") for key, value in self.cookies.items()]
        if method == "POST":
            fields.append(("content-type", "application/x-www-form-urlencoded"))
        if self.site is not None:
            fields.append(("sec-fetch-site", self.site))
        request = head(method, OWN + name, *fields, query=query, client=self.client)
        answer = await self.bench.identity.pages.answer(request, body)
        for line in answer.head.headers.all("set-cookie"):
            key, _, value = line.partition(";")[0].partition("=")
            if "Max-Age=0" in line:
                self.cookies.pop(key, None)
            else:
                self.cookies[key] = value
        return answer


def hidden(page: Fetched, action: str) -> dict[str, str]:
    """The hidden fields of the form that goes to `action`."""
    forms = re.findall(r'<form [^>]*action="([^"]+)">(.*?)</form>', page.body.decode(), re.DOTALL)
    for where, inside in forms:
        if where == OWN + action:
            found = re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', inside)
            return {name: unescape(value) for name, value in found}
    raise AssertionError(f"there is no form for {action}")
