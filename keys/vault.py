"""The client of the key server, HashiCorp Vault or OpenBao: log in, call, translate answers.

`VaultClient` owns the connection pool, one role's token and the circuit breaker; everything that
speaks to the server goes through its `call`. What the calls mean lives elsewhere: `keys.transit`,
`keys.signing` and `keys.certificates`. Patience is decided in `keys.resilience`; paths are spelled
in `keys.layout`.

Only API that Vault 1.12 and OpenBao 2.0 have in common is used
(https://openbao.org/api-docs/, https://developer.hashicorp.com/vault/api-docs).
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import requests
import urllib3
from hvac.adapters import RawAdapter
from requests.adapters import HTTPAdapter

from keys.errors import (
    KeyConfigurationError,
    VaultDeniedError,
    VaultRejectedError,
    VaultUnavailableError,
)
from keys.layout import Layout
from keys.private_files import read_private_text
from keys.resilience import Caller, CircuitBreaker, CircuitState, RetryPolicy
from keys.settings import RoleSettings, VaultSettings
from keys.vault_answers import parse_response

#: A token is renewed once this fraction of its life is over.
_RENEW_AT_FRACTION = 0.6
#: After a failed renewal the token in hand is used for so long before the next try.
_RENEWAL_PAUSE_S = 1.0
_POOL_SIZE = 64
#: Far more than the largest batch. What is larger is no answer of a key server.
_LARGEST_ANSWER_BYTES = 8 * 1024 * 1024
_READ_BYTES = 64 * 1024
_NO_COOKIES = DefaultCookiePolicy(allowed_domains=[])


@dataclass(frozen=True, slots=True, kw_only=True)
class AppRole:
    """Log in with a role id and a secret id from files of mode 0600, read again at every login."""

    mount: str
    files: RoleSettings = field(repr=False)

    def body(self) -> dict[str, str]:
        """Return the login request. Raises `KeyConfigurationError`."""
        return {
            "role_id": read_private_text(Path(self.files.role_id_file)),
            "secret_id": read_private_text(Path(self.files.secret_id_file)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedToken:
    """A token that somebody hands in for set-up. It is neither renewed nor replaced."""

    token: str = field(repr=False)

    def __post_init__(self) -> None:
        # Libraries quote a header that they cannot send.
        if not _is_header_text(self.token):
            raise KeyConfigurationError(
                "The token must be one line of printable ASCII without spaces around it; log in "
                "again and hand in what was printed."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHealth:
    """What the server says of itself to anybody (`sys/health`)."""

    initialized: bool
    sealed: bool
    standby: bool
    version: str


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    renew_at: float
    expires_at: float
    renewable: bool
    generation: int


class VaultClient:
    """One role's connection. Thread-safe; close it, or use it as a context manager.

    Every call ends within `settings.deadline_s`, logins and renewals included, or at most the
    time-outs of one attempt later: for connecting, for the head of the answer, for its body. It
    raises a `VaultError`, or `KeyConfigurationError` for credentials that cannot be read.
    Tokens appear in no message, log or `repr`. `clock` counts seconds and need not be the time of
    day.
    """

    def __init__(
        self,
        *,
        settings: VaultSettings,
        role: str,
        credentials: RoleSettings | FixedToken,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = _parse_address(settings.address)
        self.role = role
        self.layout = Layout(prefix=settings.prefix)
        self._credentials = (
            credentials
            if isinstance(credentials, FixedToken)
            else AppRole(mount=self.layout.approle, files=credentials)
        )
        self._clock = clock
        self._session = _new_session(settings.ca_file)
        self._adapter = RawAdapter(
            base_uri=self.address,
            session=self._session,
            namespace=settings.namespace or None,
            # A token must not follow a redirect to a host that nobody configured.
            allow_redirects=False,
        )
        self._breaker = CircuitBreaker(
            failures=settings.breaker_failures, open_s=settings.breaker_open_s, clock=clock
        )
        self._caller = Caller(
            policy=RetryPolicy(
                attempts=settings.attempts,
                deadline_s=settings.deadline_s,
                attempt_timeout_s=settings.timeout_s,
            ),
            breaker=self._breaker,
            clock=clock,
            sleep=sleep,
            uniform=random.random,
        )
        self._token: _Token | None = None
        self._login_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"VaultClient(address={self.address!r}, role={self.role!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections.

        The token is left to expire: other processes may share the role.
        """
        self._session.close()

    @property
    def circuit(self) -> CircuitState:
        """State of the circuit breaker."""
        return self._breaker.state

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotent: bool = True,
    ) -> dict[str, Any]:
        """Return the answer to one request as this role; `{}` for an answer without a body.

        `method` is GET, POST, DELETE or LIST; `path` stands below `/v1/`. A call that is not
        idempotent is sent once; after `VaultUnavailableError` its effect is unknown. An answer 400
        that carries results of a batch is returned, for the caller to look at each item.
        """
        deadline = self._caller.deadline()
        token = self._usable_token(deadline)
        try:
            return self._send(method, path, body, token.value, deadline, idempotent=idempotent)
        except VaultDeniedError:
            # Either this role may not do that, or its token was revoked. Only the second is mended
            # by logging in, and a denied call must not cost the server a new token each time.
            if isinstance(self._credentials, FixedToken) or self._is_alive(token, deadline):
                raise
        token = self._login(token, deadline)
        return self._send(method, path, body, token.value, deadline, idempotent=idempotent)

    def health(self, *, timeout_s: float | None = None) -> ServerHealth:
        """Ask without a token, in one attempt that the circuit breaker neither stops nor counts."""
        query = "standbyok=true&perfstandbyok=true&sealedcode=200&uninitcode=200"
        answer = self._request(
            "GET",
            f"sys/health?{query}",
            None,
            None,
            timeout_s or self._caller.policy.attempt_timeout_s,
        )
        return ServerHealth(
            initialized=bool(answer.get("initialized")),
            sealed=bool(answer.get("sealed")),
            standby=bool(answer.get("standby")),
            version=str(answer.get("version", "unknown")),
        )

    def token_ttl_s(self) -> float:
        """Log in if need be and return how long the token in hand is still good."""
        return max(0.0, self._usable_token(self._caller.deadline()).expires_at - self._clock())

    # --- Token -----------------------------------------------------------------------------------

    def _usable_token(self, deadline: float) -> _Token:
        token = self._token
        if token is None:
            return self._login(None, deadline)
        now = self._clock()
        if now < token.renew_at:
            return token
        if now >= token.expires_at:
            return self._login(token, deadline)
        # One thread renews; the others go on with the token that is still good.
        if not self._login_lock.acquire(blocking=False):
            return token
        try:
            return self._renew(token, deadline) if self._token is token else token
        finally:
            self._login_lock.release()

    def _renew(self, token: _Token, deadline: float) -> _Token:
        """Return a renewed or new token, or the old one if the server cannot be asked just now."""
        try:
            if token.renewable:
                self._token = self._ask_for_token("auth/token/renew-self", {}, token, deadline)
                # The server shortens a life that reaches the role's maximum: a new login starts
                # afresh.
                if self._token.expires_at > token.expires_at:
                    return self._token
            self._token = self._log_in(token, deadline)
        except VaultDeniedError:
            self._token = self._log_in(token, deadline)
        except VaultUnavailableError:
            pause = min(self._clock() + _RENEWAL_PAUSE_S, token.expires_at)
            self._token = _Token(
                token.value, pause, token.expires_at, token.renewable, token.generation
            )
        return self._token

    def _login(self, instead_of: _Token | None, deadline: float) -> _Token:
        """Log in unless another thread has replaced that token meanwhile."""
        if not self._login_lock.acquire(timeout=max(deadline - self._clock(), 0)):
            raise VaultUnavailableError(
                f"Role {self.role} waited too long for a login that is under way at {self.address}."
            )
        try:
            current = self._token
            stale = instead_of.generation if instead_of else 0
            if current is not None and current.generation > stale:
                return current
            self._token = self._log_in(current, deadline)
            return self._token
        finally:
            self._login_lock.release()

    def _log_in(self, previous: _Token | None, deadline: float) -> _Token:
        if isinstance(self._credentials, FixedToken):
            never = float("inf")
            return _Token(self._credentials.token, never, never, renewable=False, generation=1)
        try:
            return self._ask_for_token(
                f"{self._credentials.mount}/login", self._credentials.body(), previous, deadline
            )
        except (VaultDeniedError, VaultRejectedError) as error:
            raise VaultDeniedError(
                f"The key server refused the login of role {self.role}: its secret was revoked or "
                f"has expired, or the role does not exist under prefix {self.layout.prefix}. "
                "Remove its secret-id file and have a new one issued: with `havengate keys set-up` "
                "on a server of your own, by a restart on the one that Havengate brings."
            ) from error

    def _ask_for_token(
        self, path: str, body: Mapping[str, Any], previous: _Token | None, deadline: float
    ) -> _Token:
        asked_at = self._clock()
        value = previous.value if previous and path.endswith("renew-self") else None
        answer = self._send("POST", path, body, value, deadline).get("auth")
        if not isinstance(answer, dict):
            raise VaultRejectedError("The key server answered a login without a token.")
        lease_s, text = answer.get("lease_duration"), answer.get("client_token")
        usable = isinstance(text, str) and text and _is_header_text(text)
        if type(lease_s) is not int or lease_s <= 0 or not usable:
            raise VaultRejectedError(
                "The key server answered a login with a token that cannot be used or that has no "
                "end."
            )
        return _Token(
            value=str(text),
            renew_at=asked_at + lease_s * _RENEW_AT_FRACTION,
            expires_at=asked_at + lease_s,
            renewable=bool(answer.get("renewable")),
            generation=previous.generation + 1 if previous else 1,
        )

    def _is_alive(self, token: _Token, deadline: float) -> bool:
        try:
            self._send("GET", "auth/token/lookup-self", None, token.value, deadline)
        except VaultDeniedError:
            return False
        return True

    # --- Transport -------------------------------------------------------------------------------

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        token: str | None,
        deadline: float,
        *,
        idempotent: bool = True,
    ) -> dict[str, Any]:
        return self._caller.run(
            lambda timeout_s: self._request(method, path, body, token, timeout_s),
            deadline=deadline,
            idempotent=idempotent,
        )

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        token: str | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        where = f"{method} {path.partition('?')[0]} at {self.address}"
        try:
            with self._adapter.request(
                method,
                f"/v1/{path}",
                headers={"X-Vault-Token": token} if token else {},
                json=body,
                timeout=timeout_s,
                raise_exception=False,
                stream=True,
            ) as response:
                content = self._read_answer(response, where, timeout_s)
        except requests.exceptions.SSLError as error:
            raise VaultUnavailableError(
                f"{where}: the server's certificate was not accepted; check keys.vault.ca_file and "
                "the names in the certificate."
            ) from error
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise VaultUnavailableError(f"{where}: no answer within {timeout_s:.2g} s.") from error
        except (
            requests.exceptions.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            raise VaultUnavailableError(
                f"{where}: no connection ({type(error).__name__}); check that the server runs."
            ) from error
        return parse_response(response, content, where)

    def _read_answer(self, response: requests.Response, where: str, timeout_s: float) -> bytes:
        """Return the body. The socket's time-out begins anew with each byte; this one does not."""
        ends_at = self._clock() + timeout_s
        content = bytearray()
        while chunk := response.raw.read1(_READ_BYTES, decode_content=False):
            content += chunk
            if len(content) > _LARGEST_ANSWER_BYTES:
                raise VaultUnavailableError(
                    f"{where}: the answer is larger than {_LARGEST_ANSWER_BYTES} bytes; something "
                    "else than a key server answers there."
                )
            if self._clock() > ends_at:
                raise VaultUnavailableError(f"{where}: no whole answer within {timeout_s:.2g} s.")
        return bytes(content)


def _is_header_text(text: str) -> bool:
    return text.isascii() and text.isprintable() and text == text.strip()


def _parse_address(address: str) -> str:
    malformed = KeyConfigurationError(
        "keys.vault.address (or VAULT_ADDR) must look like https://vault.example:8200."
    )
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        # It would quote the address, and that may hold a password.
        raise malformed from None
    loopback = parts.hostname in {"127.0.0.1", "::1", "localhost"}
    if not parts.hostname or parts.scheme not in {"https", "http"}:
        raise malformed
    if parts.query or "@" in parts.netloc:
        raise malformed
    if parts.scheme == "http" and not loopback:
        raise KeyConfigurationError(
            "keys.vault.address (or VAULT_ADDR) must be https unless it is on loopback: tokens and "
            "data keys travel over it."
        )
    return address.rstrip("/")


def _new_session(ca_file: str) -> requests.Session:
    if ca_file:
        _verify_ca_file(ca_file)
    session = requests.Session()
    # Proxies, .netrc and CA bundles of the environment are for the web, not for the key server.
    session.trust_env = False
    # Packed answers could unpack to any size.
    session.headers["Accept-Encoding"] = "identity"
    session.verify = ca_file or True
    session.cookies.set_policy(_NO_COOKIES)
    adapter = HTTPAdapter(pool_connections=1, pool_maxsize=_POOL_SIZE, max_retries=0)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _verify_ca_file(ca_file: str) -> None:
    try:
        ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise KeyConfigurationError(
            f"The CA file {ca_file} cannot be used ({error.strerror or 'no certificate in it'}); "
            "keys.vault.ca_file or VAULT_CACERT must name a PEM file."
        ) from error
