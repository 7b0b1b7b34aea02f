"""Header fields by the book, for both directions. Pure: a head in, a head or an error out.

`check_request` refuses what two readers could understand differently; `clean_request` and
`clean_response` take out what belongs to one hop only (RFC 9110 section 7.6.1), what an outsider
says in the gateway's own name, and what would lead a client past the gateway. Which answer is
given, and to whom, is decided elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import replace
from enum import Enum, auto
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import BadRequestError
from gateway.settings import LimitSettings

#: For every answer that the gateway itself writes.
OWN_HEADERS: Final[tuple[tuple[str, str], ...]] = (
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'; base-uri 'none'"),
)
#: RFC 6797. One year; without `includeSubDomains`, because other hosts are not ours to decide on.
STRICT_TRANSPORT_SECURITY: Final = ("strict-transport-security", "max-age=31536000")

_PSEUDONYM = "havengate"
_OWN_PREFIXES = ("havengate-", "x-havengate-")
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings"}
)
_FORWARDING = frozenset(
    {
        "forwarded",
        "true-client-ip",
        "x-client-ip",
        "x-host",
        "x-original-host",
        "x-original-url",
        "x-real-ip",
        "x-rewrite-url",
    }
)
#: What the app says about itself, `alt-svc`, which would lead clients past the gateway, and what
#: would let a script of one app stand in front of all apps of the host.
_NOT_RELEASED = frozenset({
    "server", "x-powered-by", "alt-svc", "strict-transport-security", "service-worker-allowed",
})  # fmt: skip
#: Fields that decide where a message ends and whom it is for.
_FRAMING = frozenset({"content-length", "transfer-encoding", "host", "connection", "upgrade"})
#: `Connection` must not name these: to remove them would change the meaning of the request.
_NOT_FOR_ONE_HOP = frozenset(
    {"content-length", "content-type", "host", "authorization", "cookie", "cache-control"}
)
#: A length that no counter overflows at.
_LENGTH_DIGITS = 18
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+").fullmatch
_METHOD = re.compile(r"[A-Z]{1,20}").fullmatch
#: RFC 9110 section 5.5: field values have no control characters but the tab.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]").search
_TARGET = re.compile(r"[\x21-\x7e]*").fullmatch
_ENCODED_WRONG = re.compile(r"%(?![0-9A-Fa-f]{2})").search
_AUTHORITY = re.compile(r"(?:[a-z0-9._~-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?").fullmatch
_QUOTED = re.compile(r"[^A-Za-z0-9.:_~\[\]-]").sub


class _Kind(Enum):
    END_TO_END = auto()
    HOP = auto()
    FORWARDING = auto()
    OURS = auto()
    #: `_` in it: some apps cannot tell it from the name with `-` (RFC 3875 section 4.1.18).
    AMBIGUOUS = auto()
    #: The same, and its twin decides about framing or speaks in our name.
    TWIN = auto()
    NOT_RELEASED = auto()
    NO_TOKEN = auto()


@lru_cache(maxsize=1024)
def _kind(name: str) -> _Kind:
    if not _TOKEN(name):
        return _Kind.NO_TOKEN
    twin = name.replace("_", "-")
    ours = twin.startswith(_OWN_PREFIXES)
    if "_" in name:
        return _Kind.TWIN if ours or twin in _FRAMING else _Kind.AMBIGUOUS
    if ours:
        return _Kind.OURS
    if name in _HOP_BY_HOP or name.startswith("proxy-"):
        return _Kind.HOP
    if name in _FORWARDING or name.startswith("x-forwarded-"):
        return _Kind.FORWARDING
    return _Kind.NOT_RELEASED if name in _NOT_RELEASED else _Kind.END_TO_END


# --- What comes in --------------------------------------------------------------------------------


def check_request(head: RequestHead, limits: LimitSettings | None = None) -> None:
    """Raise `BadRequestError` unless everybody who reads this head understands the same.

    Checked: method, target, sizes, names and values (RFC 9110 section 5), `Host` (RFC 9112 section
    3.2), framing (RFC 9112 section 6.3), `Expect` (RFC 9110 section 10.1.1), and for HTTP/2 that no
    connection-specific field is there (RFC 9113 section 8.2.2).
    """
    limits = limits or _DEFAULT_LIMITS
    _check_target(head, limits)
    fields = head.headers.fields
    if len(fields) > limits.header_fields:
        raise BadRequestError(
            f"There are more than {limits.header_fields} header fields.", status=431
        )
    size = sum(len(name) + len(value) + 4 for name, value in fields)
    if size > limits.header_bytes:
        raise BadRequestError(
            f"The header fields are larger than {limits.header_bytes} bytes.", status=431
        )
    for name, _ in fields:
        kind = _kind(name)
        if kind is _Kind.NO_TOKEN:
            raise BadRequestError(
                "The name of a header field has characters that names cannot have."
            )
        if kind is _Kind.TWIN:
            raise BadRequestError(
                "The name of a header field is one that the gateway keeps for itself, written "
                "with an underscore."
            )
    if _CONTROL("".join([value for _, value in fields])):
        raise BadRequestError("The value of a header field has control characters in it.")
    _check_host(head)
    _check_framing(head)


_DEFAULT_LIMITS: Final = LimitSettings()


def _check_target(head: RequestHead, limits: LimitSettings) -> None:
    if not _METHOD(head.method):
        raise BadRequestError("The method is not one that is known.", status=501)
    if not head.path.startswith("/"):
        raise BadRequestError("The target of the request must be a path that begins with a slash.")
    if len(head.path) + len(head.query) > limits.target_bytes:
        raise BadRequestError(f"The target is longer than {limits.target_bytes} bytes.", status=414)
    target = head.target
    if not _TARGET(target) or "#" in target or _ENCODED_WRONG(head.path):
        raise BadRequestError("The target has characters that must be percent-encoded.")


def _check_host(head: RequestHead) -> None:
    hosts = head.headers.all("host")
    if len(hosts) > 1:
        raise BadRequestError("There must be exactly one Host; there are several.")
    if not hosts and head.http_version in {"1", "1.0", "1.1"}:
        raise BadRequestError("There must be exactly one Host; there is none.")
    authority = head.authority.lower()
    if hosts and hosts[0].strip().lower() != authority:
        raise BadRequestError("Host and the authority of the target must be the same.")
    if not _AUTHORITY(authority):
        raise BadRequestError("The host of the request is not a name or address with a port.")


def _check_framing(head: RequestHead) -> None:
    headers = head.headers
    lengths, codings = headers.all("content-length"), headers.all("transfer-encoding")
    if len(lengths) > 1:
        raise BadRequestError("There must be one Content-Length at most; there are several.")
    if lengths and not (
        lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) <= _LENGTH_DIGITS
    ):
        raise BadRequestError("Content-Length must be a number.")
    if lengths and codings:
        raise BadRequestError("Content-Length and Transfer-Encoding exclude each other.")
    if head.http_version in {"1", "1.0", "1.1"}:
        if codings and [one.strip().lower() for one in codings] != ["chunked"]:
            raise BadRequestError("The only transfer coding offered is chunked.", status=501)
    elif any(_kind(name) is _Kind.HOP and not _is_trailers(name, value) for name, value in headers):
        raise BadRequestError("HTTP/2 has no header fields for one connection (RFC 9113, 8.2.2).")
    if _NOT_FOR_ONE_HOP & _named_by_connection(headers):
        raise BadRequestError("Connection names a field that is not for one hop only.")
    for expected in headers.all("expect"):
        if expected.strip().lower() != "100-continue":
            raise BadRequestError("The only thing to expect is 100-continue.", status=417)


def is_upgrade(head: RequestHead) -> bool:
    """Say whether the client wants to leave HTTP (RFC 9110 section 7.8, RFC 8441).

    An offer of cleartext HTTP/2 is ignored, as RFC 9110 allows: the request itself is plain HTTP.
    """
    if head.method == "CONNECT" or head.headers.get("sec-websocket-key") is not None:
        return True
    wanted = {
        one.strip().lower() for value in head.headers.all("upgrade") for one in value.split(",")
    }
    return bool(wanted - {"h2c", ""})


def is_service_worker(head: RequestHead) -> bool:
    """Say whether a browser asks for a script that would stand in front of the whole host.

    Browsers name such a request themselves, and no page can leave that out (Service Workers,
    "Update", step 5; Fetch, `Sec-Fetch-Dest`).
    """
    headers = head.headers
    return headers.get("service-worker") is not None or any(
        one.strip().lower() == "serviceworker" for one in headers.all("sec-fetch-dest")
    )


# --- What passes ----------------------------------------------------------------------------------


def clean_request(head: RequestHead, *, forwarded: bool = True) -> RequestHead:
    """The request as it goes to the app: end-to-end fields only, `Via`, and who asked for what.

    `forwarded=False` tells nothing of the client, for requests that leave the house. `Host` is not
    in it: whoever sends it knows whether the app gets its own name or the client's. `Expect` was
    answered here (RFC 9110 section 10.1.1 lets a proxy do so).
    """
    named = _named_by_connection(head.headers)
    kept = [
        (name, value)
        for name, value in head.headers.fields
        if name not in named and name not in {"host", "expect", "via"} and _passes_inward(name)
    ]
    cookies = [value for name, value in kept if name == "cookie"]
    if len(cookies) > 1:
        # HTTP/2 clients send cookies in crumbs; HTTP/1.1 knows one field (RFC 9113 section 8.2.3).
        kept = [pair for pair in kept if pair[0] != "cookie"]
        kept.append(("cookie", "; ".join(cookies)))
    if any(_is_trailers(name, value) for name, value in head.headers.fields):
        kept.append(("te", "trailers"))
    kept.append(("via", _via(head.headers, head.http_version)))
    if forwarded:
        kept.extend(forwarded_for(head))
    return head.with_headers(Headers(tuple(kept)))


@lru_cache(maxsize=1024)
def _passes_inward(name: str) -> bool:
    return _kind(name) in {_Kind.END_TO_END, _Kind.NOT_RELEASED}


def clean_response(head: ResponseHead) -> ResponseHead:
    """The app's answer as it may leave: end-to-end fields only, nothing about what runs behind.

    `Strict-Transport-Security` is ours, because the connection is.
    """
    named = _named_by_connection(head.headers)
    kept = [
        (name, value)
        for name, value in head.headers.fields
        if name not in named and name != "via" and _passes_outward(name)
    ]
    kept.append(("via", _via(head.headers, "1.1")))
    kept.append(STRICT_TRANSPORT_SECURITY)
    return replace(head, headers=Headers(tuple(kept)))


@lru_cache(maxsize=1024)
def _passes_outward(name: str) -> bool:
    # `X-Forwarded-…` in an answer means nothing to anybody, but may name inner addresses.
    return _kind(name) in {_Kind.END_TO_END, _Kind.AMBIGUOUS}


def never_stored(head: ResponseHead) -> ResponseHead:
    """The same answer, for no cache to keep (RFC 9111 section 5.2.2.5)."""
    headers = head.headers.without({"expires", "pragma"}).with_("cache-control", "no-store")
    return replace(head, headers=headers)


def asked_each_time(head: ResponseHead) -> ResponseHead:
    """The same answer, for one person's cache only, which asks again each time before it shows it.

    Whoever sits at the same machine next may not be the same person (RFC 9111 sections 5.2.2.4 and
    5.2.2.7). What the app itself wants stored nowhere stays so.
    """
    told = ",".join(head.headers.all("cache-control")).lower()
    if "no-store" in told:
        return never_stored(head)
    headers = head.headers.without({"expires", "pragma"})
    return replace(head, headers=headers.with_("cache-control", "private, no-cache"))


def forwarded_for(head: RequestHead) -> tuple[tuple[str, str], ...]:
    """Fields that tell the app who asked for what: RFC 7239 and the older ones that apps read.

    Only what the gateway has seen itself is in them.
    """
    client = _address(head.client)
    node = f'"[{client}]"' if ":" in client else client
    host = _QUOTED("", head.authority)
    return (
        ("forwarded", f'for={node or "unknown"};host="{host}";proto={head.scheme}'),
        ("x-forwarded-for", client or "unknown"),
        ("x-forwarded-proto", head.scheme),
        ("x-forwarded-host", host),
    )


@lru_cache(maxsize=1024)
def _address(client: str | None) -> str:
    """The address without its port, or nothing if it is not one."""
    text = (client or "").strip("[]")
    try:
        return str(ip_address(text))
    except ValueError:
        return ""


def _via(headers: Headers, version: str) -> str:
    return ", ".join([*headers.all("via"), f"{version} {_PSEUDONYM}"])


def _named_by_connection(headers: Headers) -> frozenset[str]:
    values = headers.all("connection")
    if not values:
        return frozenset()
    return frozenset(one.strip().lower() for value in values for one in value.split(","))


def _is_trailers(name: str, value: str) -> bool:
    return name == "te" and value.strip().lower() == "trailers"
