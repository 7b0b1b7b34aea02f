"""From templates to answers: pages without scripts, under the strictest policy a browser knows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gateway.core.commands import Fetched
from gateway.core.messages import Headers, ResponseHead
from gateway.identity.texts import text
from gateway.routes import OWN_PREFIX

_PAGES: Final = Path(__file__).parent / "pages"
_POLICY: Final = (
    "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'"
)
_SECURITY: Final = (
    ("content-security-policy", _POLICY),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    # `no-referrer` would make browsers send `Origin: null` with our own forms.
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)
_NOT_KEPT: Final = ("cache-control", "no-store")
_COOKIE_ATTRIBUTES: Final = "Path=/; Secure; HttpOnly; SameSite=Lax"


class Renderer:
    """Fills templates. Everything that is put into one is escaped."""

    def __init__(self, *, crisis_url: str = "") -> None:
        self._environment = Environment(
            loader=FileSystemLoader(_PAGES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals |= {"t": text, "own": OWN_PREFIX, "crisis_url": crisis_url}
        self._environment.filters |= {"when": _when, "qr": _qr}
        self._style = (_PAGES / "style.css").read_bytes()

    def page(
        self,
        name: str,
        values: Mapping[str, Any],
        *,
        status: int = 200,
        cookies: tuple[str, ...] = (),
    ) -> Fetched:
        """The page of that template."""
        body = self._environment.get_template(f"{name}.html").render(**values).encode()
        return _answer(status, body, "text/html; charset=utf-8", _NOT_KEPT, *_set(cookies))

    def problem(self, status: int, *, headers: tuple[tuple[str, str], ...] = ()) -> Fetched:
        """A page that says what went wrong and what to do."""
        known = status if f"error.{status}" in _KNOWN else 400
        values = {"title": text(f"error.{known}.title"), "message": text(f"error.{known}")}
        page = self.page("problem", values, status=status)
        fields = (*page.head.headers.fields, *headers)
        return Fetched(head=ResponseHead(status=status, headers=Headers(fields)), body=page.body)

    def style(self) -> Fetched:
        """The style sheet."""
        return _answer(
            200, self._style, "text/css; charset=utf-8", ("cache-control", "public, max-age=3600")
        )


_KNOWN: Final = frozenset({"error.400", "error.403", "error.404", "error.405", "error.503"})


def redirect(path: str, *, cookies: tuple[str, ...] = ()) -> Fetched:
    """Go on with GET somewhere on this host (RFC 9110 section 15.4.4)."""
    fields = (("location", path), _NOT_KEPT, *_SECURITY, *_set(cookies), ("content-length", "0"))
    return Fetched(head=ResponseHead(status=303, headers=Headers(fields)), body=b"")


def key_set(body: bytes) -> Fetched:
    """A JSON Web Key Set, for apps and whoever else verifies statements."""
    return _answer(200, body, "application/jwk-set+json", ("cache-control", "public, max-age=60"))


def cookie(name: str, value: str) -> str:
    """A cookie of this browser session, for this host only."""
    return f"{name}={value}; {_COOKIE_ATTRIBUTES}"


def kept_cookie(name: str, value: str, max_age_s: int) -> str:
    """A cookie that stays when the browser is closed, for this host only."""
    return f"{cookie(name, value)}; Max-Age={max_age_s}"


def no_cookie(name: str) -> str:
    """What makes a browser forget a cookie."""
    return f"{name}=; {_COOKIE_ATTRIBUTES}; Max-Age=0"


def _answer(status: int, body: bytes, kind: str, *fields: tuple[str, str]) -> Fetched:
    headers = Headers(
        (("content-type", kind), ("content-length", str(len(body))), *fields, *_SECURITY)
    )
    return Fetched(head=ResponseHead(status=status, headers=headers), body=body)


def _set(cookies: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(("set-cookie", one) for one in cookies)


def _qr(content: str) -> Markup:
    """A QR code (ISO/IEC 18004) as a drawing inside the page.

    As a picture with an address of its own it would be fetched by it, and the seed stand in a URL.
    """
    import segno

    drawn = segno.make(content, error="m", micro=False).svg_inline(
        border=4, dark="#000", light="#fff", svgclass="qr", lineclass=None, omitsize=True
    )
    # Only numbers and colours stand in it.
    return Markup(drawn)  # noqa: S704


def _when(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%d %B %Y, %H:%M UTC")
