"""What a request shows of its sender, and whether it was sent from one of our own pages. Pure.

Cookies: RFC 6265bis (`__Host-`, section 4.1.3.2). Cross-site requests: the Fetch Metadata headers
(w3.org/TR/fetch-metadata) and `Origin` (RFC 6454).
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from gateway.core.messages import Headers, RequestHead

SESSION_COOKIE: Final = "__Host-havengate"
PURPOSE_HEADER: Final = "havengate-purpose"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]+) *").fullmatch
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}


def cookies(headers: Headers, name: str) -> list[str]:
    """All values of one cookie, in order. More than one means that somebody else set one, too."""
    return [value for key, value in _pairs(headers) if key == name]


def bearer_token(header: str) -> str | None:
    """The token of an `Authorization: Bearer …` (RFC 6750 section 2.1), or None."""
    found = _BEARER(header)
    return None if found is None else found[1]


def strip(headers: Headers) -> Headers:
    """The same without what was meant for the gateway: its cookies and the credentials it used.

    Other cookies stay. Letters of either case count as ours: the app may not tell them apart.
    """
    kept: list[tuple[str, str]] = []
    for key, value in headers:
        if key in {"authorization", PURPOSE_HEADER}:
            continue
        if key == "cookie":
            others = [
                part.strip()
                for part in value.split(";")
                if part.strip() and not _name(part).lower().startswith(SESSION_COOKIE.lower())
            ]
            if others:
                kept.append((key, "; ".join(others)))
            continue
        kept.append((key, value))
    return Headers(tuple(kept))


def is_same_origin(head: RequestHead) -> bool:
    """Whether a browser says that the request comes from this very host, or from the person.

    Whoever says neither `Sec-Fetch-Site` nor `Origin` is not believed.
    """
    sites, origins = head.headers.all("sec-fetch-site"), head.headers.all("origin")
    if len(sites) > 1 or len(origins) > 1:
        return False
    if sites:
        return sites[0] in {"same-origin", "none"}
    if not origins:
        return False
    given = _origin(origins[0])
    return given is not None and given == _origin(f"{head.scheme}://{head.authority}")


def is_navigation(head: RequestHead) -> bool:
    """Whether a browser goes to a page itself; no script asks for it and no frame shows it.

    No script can set these fields. What sends neither is no browser of today, and has no scripts.
    """
    modes, kinds = head.headers.all("sec-fetch-mode"), head.headers.all("sec-fetch-dest")
    return modes in ([], ["navigate"]) and kinds in ([], ["document"])


def _pairs(headers: Headers) -> list[tuple[str, str]]:
    parts = [part for line in headers.all("cookie") for part in line.split(";")]
    return [(_name(part), part.partition("=")[2].strip()) for part in parts if part.strip()]


def _name(part: str) -> str:
    return part.partition("=")[0].strip()


def _origin(text: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port; None for anything that is no origin (`null` among them)."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, port or _DEFAULT_PORTS.get(parts.scheme)
