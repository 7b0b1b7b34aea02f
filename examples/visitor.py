"""Somebody with a browser's manners: cookies, forms, redirects, and nothing of Havengate's code.

Used by the demo, the end-to-end tests and the benchmarks. HTTP/1.1 over TLS, standard library.
"""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pyotp

_CSRF = re.compile(r'name="csrf" value="([^"]+)"')
_TICKET = re.compile(r'name="ticket" value="([^"]+)"')
_OWN = "/.havengate/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Visitor:
    """One person at one gateway. `ca_file`: who issued the gateway's certificate."""

    def __init__(self, base_url: str, ca_file: Path) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "localhost", parts.port or 443
        self.base_url = base_url.rstrip("/")
        self._context = ssl.create_default_context(cafile=str(ca_file))
        self._connection: HTTPSConnection | None = None
        self.cookies: dict[str, str] = {}
        self._totp_uri = ""

    def ask(
        self,
        method: str,
        target: str,
        *,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send one request. What is no bytes goes as FHIR JSON."""
        fields = {"accept": "application/fhir+json, application/json", **(headers or {})}
        fields = {name.lower(): value for name, value in fields.items()}
        content = body
        if body is not None and not isinstance(body, bytes):
            content = json.dumps(body).encode()
            fields.setdefault("content-type", "application/fhir+json")
        if self.cookies:
            fields["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            fields.setdefault("sec-fetch-site", "same-origin")
        connection = self._connected()
        try:
            try:
                connection.request(method, target, body=content, headers=fields)
            except BrokenPipeError:
                # A connection that the gateway had ended: nothing of the request has arrived.
                self.close()
                connection = self._connected()
                connection.request(method, target, body=content, headers=fields)
            response = connection.getresponse()
            data = response.read()
        except (OSError, ssl.SSLError):
            self.close()
            raise
        for name, value in response.getheaders():
            if name.lower() == "set-cookie":
                self._keep(value)
        given = {name.lower(): value for name, value in response.getheaders()}
        return Answer(status=response.status, headers=given, body=data)

    def get(self, target: str, **headers: str) -> Answer:
        """Read."""
        return self.ask("GET", target, headers=headers)

    @contextmanager
    def receiving(self, target: str) -> Iterator[HTTPResponse]:
        """Read an answer while it comes, over a connection of its own."""
        connection = HTTPSConnection(self._host, self._port, context=self._context, timeout=60)
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        try:
            connection.request("GET", target, headers={"cookie": cookie})
            yield connection.getresponse()
        finally:
            connection.close()

    def post(self, target: str, body: Any, **headers: str) -> Answer:
        """Write."""
        return self.ask("POST", target, body=body, headers=headers)

    def form(self, page: str, fields: dict[str, str]) -> Answer:
        """Open one of the gateway's pages and send its form."""
        shown = self.ask("GET", f"{_OWN}{page}", headers={"accept": "text/html"})
        return self._submit(page, shown, fields)

    def sign_in(self, login: str, password: str, totp_uri: str, *, at: int | None = None) -> None:
        """Sign in with password and second factor. Raises `PermissionError` if refused."""
        shown = self.form("sign-in", {"login": login, "password": password})
        ticket = _TICKET.search(shown.text)
        if ticket is None:
            raise PermissionError(f"The password of {login} was refused ({shown.status}).")
        self._totp_uri = totp_uri
        code = code_of(totp_uri, at)
        done = self._submit("sign-in/code", shown, {"ticket": ticket[1], "code": code})
        if done.status not in {302, 303}:
            raise PermissionError(f"The code of {login} was refused ({done.status}).")

    def step_up(self, totp_uri: str, *, at: int | None = None) -> Answer:
        """Show the second factor again."""
        return self.form("step-up", {"code": code_of(totp_uri, at)})

    def break_glass(self, patient: str, reason: str, minutes: int) -> Answer:
        """Open a record in an emergency. The code is not looked at just after the sign-in."""
        asked = {"patient": patient, "reason": reason, "minutes": str(minutes)}
        return self.form("break-glass", asked | {"code": code_of(self._totp_uri)})

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _submit(self, page: str, shown: Answer, fields: dict[str, str]) -> Answer:
        csrf = _CSRF.search(shown.text)
        if csrf is None:
            raise PermissionError(f"The page {page} showed no form ({shown.status}).")
        body = urlencode({"csrf": csrf[1], **fields}).encode()
        return self.ask(
            "POST",
            f"{_OWN}{page}",
            body=body,
            headers={
                "accept": "text/html",
                "content-type": "application/x-www-form-urlencoded",
                "origin": self.base_url,
                "sec-fetch-site": "same-origin",
            },
        )

    def _connected(self) -> HTTPSConnection:
        if self._connection is None:
            self._connection = HTTPSConnection(
                self._host, self._port, context=self._context, timeout=60
            )
        return self._connection

    def _keep(self, header: str) -> None:
        pair, *attributes = header.split(";")
        name, _, value = pair.strip().partition("=")
        if not value or any("max-age=0" in one.lower() for one in attributes):
            self.cookies.pop(name, None)
        else:
            self.cookies[name] = value


def secret_of(totp_uri: str) -> str:
    """The secret in an `otpauth:` address."""
    return parse_qs(urlsplit(totp_uri).query)["secret"][0]


def code_of(totp_uri: str, at: int | None = None) -> str:
    """The code now, or at a Unix time in seconds."""
    totp = pyotp.TOTP(secret_of(totp_uri))
    return totp.now() if at is None else totp.at(at)
