"""Forms of the gateway's own pages: what was sent, whether we made the form, and where to go next.

A form carries a code that only we can make, bound to the session, or before there is one to a
cookie of the visit (OWASP CSRF Prevention, HMAC-based token). A ticket says that somebody showed
his password a moment ago, and is good in that visit only.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlsplit

from gateway.core.messages import RequestHead
from gateway.errors import BadRequestError
from gateway.identity.accounts import Accounts
from gateway.identity.records import Account
from gateway.identity.shared_secret import SharedSecret
from keys.ports import Clock

VISIT_COOKIE: Final = "__Host-havengate-visit"
MAX_BODY_BYTES: Final = 16_384
_MAX_FIELDS: Final = 16
_MAX_NEXT: Final = 2_048
#: Long enough to install an authenticator app.
_TICKET_S: Final = 900
_TICKET_PARTS: Final = 3


def parse_form(head: RequestHead, body: bytes) -> dict[str, str]:
    """The fields of a form. Raises `BadRequestError` for anything that no form of ours sends."""
    kind = (head.headers.get("content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise BadRequestError("expected a form, got another type of content", status=415)
    if len(body) > MAX_BODY_BYTES:
        raise BadRequestError(f"expected at most {MAX_BODY_BYTES} bytes of form", status=413)
    return _fields(body.decode("utf-8", "replace"))


def parse_query(head: RequestHead) -> dict[str, str]:
    """The fields of a query. Raises `BadRequestError` if one stands twice."""
    return _fields(head.query)


def _fields(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise BadRequestError(f"expected at most {_MAX_FIELDS} fields, got more") from error
    if len({name for name, _ in pairs}) != len(pairs):
        raise BadRequestError("expected each field once, got one twice")
    return dict(pairs)


def safe_next(path: str, default: str) -> str:
    """`path` if it is one on this very host that a browser reads as we do, else `default`."""
    plain = 0 < len(path) <= _MAX_NEXT and path.isascii() and path.isprintable()
    if not plain or " " in path or "\\" in path or not path.startswith("/"):
        return default
    if path.startswith("//"):
        return default
    try:
        parts = urlsplit(path)
    except ValueError:
        return default
    return default if parts.scheme or parts.netloc else path


class Forms:
    """Makes and checks the codes and tickets."""

    def __init__(self, secret: SharedSecret, *, clock: Clock) -> None:
        self._secret = secret
        self._clock = clock

    def code(self, bound_to: str) -> str:
        """What a form bound to a session or visit carries."""
        return self._secret.mac("form", bound_to)

    def is_ours(self, fields: dict[str, str], bound_to: str) -> bool:
        """Whether we made this form, for this session or visit."""
        return bool(bound_to) and self._secret.matches(fields.get("csrf", ""), "form", bound_to)

    def ticket(self, account: Account, visit: str) -> str:
        """Says that the password of this account was shown now, in this visit."""
        at = str(int(self._clock()))
        return f"{account.id}.{at}.{self._sealed(account, at, visit)}"

    def account_of(self, ticket: str, visit: str, accounts: Accounts) -> Account | None:
        """Whose ticket this is. None if it is not ours, too old, or the password changed since.

        Blocking: the account is read again.
        """
        parts = ticket.split(".")
        if len(parts) != _TICKET_PARTS or not visit:
            return None
        name, at, code = parts
        if not (at.isascii() and at.isdecimal()) or len(at) > len("10000000000"):
            return None
        account = accounts.get(name)
        if account is None or account.locked:
            return None
        parts_of_code = (account.id, at, visit, account.password_hash)
        if not self._secret.matches(code, "ticket", *parts_of_code):
            return None
        return account if 0 <= self._clock() - int(at) <= _TICKET_S else None

    def _sealed(self, account: Account, at: str, visit: str) -> str:
        return self._secret.mac("ticket", account.id, at, visit, account.password_hash)
