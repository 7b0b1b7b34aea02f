"""Which app a request is for. Pure: settings in, routes out.

A path that two programs could read differently belongs to no app (`check_path`). The same holds
for one that would reach an app's prefix only in another spelling: `/%66hir` and `/FHIR` are `/fhir`
to many apps, so here they are nobody's and never fall through to a route with looser rules.

What a request to that app means is told by `gateway.fhir` or `gateway.content`.
Paths: RFC 3986 sections 2.1, 3.3 and 6.2; authorities: RFC 9110 section 4.2.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from gateway.errors import BadRequestError, GatewayConfigurationError
from gateway.settings import RouteSettings

#: The gateway's own pages, on every host.
OWN_PREFIX = "/.havengate/"

_OWN = OWN_PREFIX.strip("/")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch
_PATH = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)+").fullmatch
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}").search
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:@/\\?#\[\]%]+)(?::([0-9]{1,5}))?").fullmatch
_DOTS = frozenset({".", ".."})
_FHIR_FIELD = re.compile(r"[A-Z][A-Za-z]*(?:\.[A-Za-z][A-Za-z0-9]*)+").fullmatch
_JSON_FIELD = re.compile(r"[A-Za-z]{1,48}:/.+").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One app, ready to be used. `base` is its path prefix without a slash at the end."""

    settings: RouteSettings = field(repr=False)
    name: str
    base: str
    upstream_scheme: str
    upstream_authority: str
    upstream_base: str


# --- For each request -----------------------------------------------------------------------------


def check_path(path: str) -> None:
    """Raise `BadRequestError` for a path that two programs could read differently.

    Such are dot segments, empty segments but the last, encoded slashes, backslashes and control
    characters, all of these encoded twice, and what is no UTF-8.
    """
    if not _PATH(path):
        raise _ambiguous("expected a path of segments in the characters of RFC 3986")
    if "//" in path:
        raise _ambiguous("an empty segment stands in the path")
    for segment in path.split("/"):
        if segment in _DOTS or "%" in segment or ";" in segment:
            _check_segment(segment)


def segments_of(path: str) -> tuple[str, ...]:
    """The decoded segments of a path that `check_path` lets pass. `/` has one, which is empty."""
    return tuple(decoded(segment) for segment in path.split("/")[1:])


def decoded(segment: str) -> str:
    """A segment with its percent-encoding undone. Raises `BadRequestError` unless it is UTF-8."""
    if "%" not in segment:
        return segment
    try:
        return unquote_to_bytes(segment).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _ambiguous("a segment is not UTF-8") from error


def folded(segment: str) -> str:
    """What an app may take a decoded segment for that ignores case and `;parameters`."""
    return unicodedata.normalize("NFKC", segment.partition(";")[0]).casefold()


def match(routes: Sequence[Route], authority: str, path: str) -> Route | None:
    """The route for a request, or None. A path with dot segments or encoded slashes has none."""
    try:
        check_path(path)
        segments = segments_of(path)
    except BadRequestError:
        return None
    host = _host_of(authority)
    if host is None or folded(segments[0]) == _OWN:
        return None
    loose = "/" + "/".join(folded(one) for one in segments)
    for route in routes:
        named, base = _sought(route)
        if named in {"", host} and _is_below(loose, base):
            return route if _is_below(path, route.base) else None
    return None


def upstream_path(route: Route, path: str) -> str:
    """The path that the app is asked for. `path` is the whole one that the client wrote.

    With `strip_path` the route's own prefix is taken away; what the URL of the app ends in is put
    in front in any case.
    """
    if route.settings.strip_path:
        path = path.removeprefix(route.base) or "/"
    return route.upstream_base + path


def client_location(route: Route, location: str) -> str:
    """A redirect or `Location` of the app's, as the client can follow it through the gateway.

    An address on the app itself becomes a path on the gateway; others stay as they are.
    """
    own = f"{route.upstream_scheme}://{route.upstream_authority}"
    absolute = location == own or location.startswith((f"{own}/", f"{own}?"))
    if not absolute and (not location.startswith("/") or location.startswith("//")):
        return location
    target = location.removeprefix(own) if absolute else location
    if route.upstream_base and _is_below(target.partition("?")[0], route.upstream_base):
        target = target.removeprefix(route.upstream_base)
    elif route.upstream_base:
        return target or "/"
    return ((route.base if route.settings.strip_path else "") + target) or "/"


def _check_segment(segment: str) -> None:
    text = decoded(segment)
    if _ENCODED(text):
        raise _ambiguous("a part is percent-encoded twice")
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    if "/" in plain or "\\" in plain or any(ord(one) < 0x20 or ord(one) == 0x7F for one in plain):  # noqa: PLR2004
        raise _ambiguous("a slash, backslash or control character is encoded in a segment")
    if plain.partition(";")[0].strip() in _DOTS:
        raise _ambiguous("a segment is a dot segment")


def _ambiguous(what: str) -> BadRequestError:
    # The path itself stays out: it may name a person.
    return BadRequestError(f"The path cannot be relied upon: {what}. Write it in its plain form.")


def _is_below(path: str, base: str) -> bool:
    return path == base or path.startswith(f"{base}/")


def _sought(route: Route) -> tuple[str, str]:
    """Host and prefix of a route in the form in which requests are compared with them."""
    host = route.settings.host and _host_of(route.settings.host)
    return host or "", _folded_base(route.base)


@lru_cache(maxsize=1_024)
def _folded_base(base: str) -> str:
    return base and "/" + "/".join(folded(one) for one in segments_of(base))


@lru_cache(maxsize=1_024)
def _host_of(authority: str) -> str | None:
    """The host in one spelling, without port; None if it is none. RFC 3986 section 6.2.2.1."""
    parts = _AUTHORITY(authority)
    if parts is None:
        return None
    name = parts[1]
    if name.startswith("["):
        try:
            return str(IPv6Address(name[1:-1]))
        except ValueError:
            return None
    try:
        ascii_name = name.removesuffix(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        return None
    return ascii_name or None


# --- At the start ---------------------------------------------------------------------------------


def compile_routes(settings: Sequence[RouteSettings]) -> tuple[Route, ...]:
    """Make routes in the order in which they are tried: named hosts first, longest path first.

    Raises `GatewayConfigurationError` for two routes that nothing distinguishes, and for anything
    else that cannot be meant.
    """
    routes = [_compile(one) for one in settings]
    by_name: dict[str, Route] = {}
    by_place: dict[tuple[str, str], Route] = {}
    for route in routes:
        if route.name.casefold() in by_name:
            raise _wrong(route.name, "expected a name of its own, and another route has it")
        other = by_place.get(_sought(route))
        if other is not None:
            raise _wrong(
                route.name,
                f"nothing distinguishes it from the route “{other.name}”: give one of them "
                "another host or path",
            )
        by_name[route.name.casefold()] = route
        by_place[_sought(route)] = route
    for route in routes:
        _check_facts(route.settings, {one.name: one for one in settings})
    return tuple(sorted(routes, key=_rank))


def _rank(route: Route) -> tuple[bool, int, str]:
    host, base = _sought(route)
    return (not host, -base.count("/"), base)


def _compile(settings: RouteSettings) -> Route:
    name = settings.name
    if not _NAME(name) or name.casefold() == "havengate":
        raise _wrong(
            name, "expected a name of letters, digits, “.”, “_” and “-”, and not “havengate”"
        )
    if settings.host and (":" in settings.host.strip("[]") and not settings.host.startswith("[")):
        raise _wrong(name, "expected a host without port; write an IPv6 address in brackets")
    if settings.host and (_host_of(settings.host) is None or _AUTHORITY(settings.host)[2]):  # type: ignore[index]
        raise _wrong(name, "expected in host a name or address without scheme, port or path")
    base = _checked_path(name, "path", settings.path)
    if base and folded(segments_of(base)[0]) == _OWN:
        raise _wrong(name, f"the path {OWN_PREFIX} is the gateway's own; choose another")
    parts = _upstream(settings)
    upstream_base = _checked_path(name, "upstream", parts.path or "/")
    if base and upstream_base.endswith(base) and not settings.strip_path:
        raise _wrong(
            name,
            f"the app would be asked for {upstream_base}{base}: write strip_path = true, or leave "
            f"{base} out of upstream",
        )
    _check_content(settings)
    return Route(
        settings=settings,
        name=name,
        base=base,
        upstream_scheme=parts.scheme,
        upstream_authority=parts.netloc.lower(),
        upstream_base=upstream_base,
    )


def _checked_path(name: str, key: str, path: str) -> str:
    base = path.rstrip("/")
    try:
        if not path.startswith("/"):
            raise _ambiguous("it does not begin with a slash")
        check_path(base or "/")
    except BadRequestError as error:
        raise _wrong(
            name, f"expected in {key} a path such as /app, without dots, “//” or encoded slashes"
        ) from error
    return base


def _upstream(settings: RouteSettings) -> SplitResult:
    expected = "expected in upstream a URL such as http://127.0.0.1:8080 or https://app.example.org"
    try:
        parts = urlsplit(settings.upstream)
        port = parts.port
    except ValueError as error:
        raise _wrong(settings.name, expected) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise _wrong(settings.name, expected)
    if _AUTHORITY(parts.netloc) is None or parts.query or parts.fragment:
        raise _wrong(settings.name, f"{expected}, without a name, a question mark or “#”")
    open_way = parts.scheme == "http" and not _is_loopback(parts.hostname)
    if open_way and not settings.insecure_upstream:
        raise _wrong(
            settings.name,
            "the way to the app would not be encrypted: write https:// (ca_file names an authority "
            "of your own), or run the app on this machine and write http://127.0.0.1:PORT; "
            "insecure_upstream = true lets everything pass in the clear, which is for a network "
            "that nothing but the gateway and this app can reach",
        )
    if settings.insecure_upstream and not open_way:
        raise _wrong(
            settings.name,
            "insecure_upstream = true is only for http:// to another machine: leave it out",
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_content(settings: RouteSettings) -> None:
    """Refuse rules and fields that this kind of content could not keep."""
    name, content = settings.name, settings.content
    if content == "fhir" and settings.rules:
        raise _wrong(name, "FHIR needs no rules: leave them out, or write content = “json”")
    if content == "json" and not settings.rules:
        raise _wrong(
            name, "content = “json” without rules lets nothing pass: add [[gateway.routes.rules]]"
        )
    if content == "opaque" and settings.fields:
        raise _wrong(
            name, "fields cannot be protected in what is not looked into: write content = “json”"
        )
    form, example = (
        (_FHIR_FIELD, "Patient.telecom") if content == "fhir" else (_JSON_FIELD, "Mood:/note")
    )
    for one in settings.fields:
        if not form(one.path):
            raise _wrong(
                name, f"expected a field such as {example} for content = “{content}”, got another"
            )


def names_patients(settings: RouteSettings) -> bool:
    """Whether anything of this app is known to belong to a patient."""
    return settings.content == "fhir" or any(
        rule.patient or rule.request_patient or "{patient}" in rule.path for rule in settings.rules
    )


def _check_facts(settings: RouteSettings, others: dict[str, RouteSettings]) -> None:
    name, facts = settings.name, settings.patient_facts
    if settings.patient_consents == "none" and settings.content != "fhir":
        raise _wrong(name, "patient_consents is for routes with content = “fhir”: leave it out")
    if facts == "none":
        return
    if facts in {"", "upstream"}:
        if settings.content == "fhir" or (not facts and not names_patients(settings)):
            return
        raise _wrong(
            name,
            "it has records of patients: write in patient_facts the name of the fhir route that "
            "knows care teams and consents, or “none” if there is none",
        )
    other = others.get(facts)
    if other is None or other.content != "fhir" or other.patient_facts not in {"", "upstream"}:
        raise _wrong(
            name,
            "expected in patient_facts “upstream”, “none” or the name of a route with "
            "content = “fhir” that asks its own app",
        )


def _wrong(name: str, what: str) -> GatewayConfigurationError:
    return GatewayConfigurationError(f"Route “{name}”: {what}.")
