"""The operator's list of hosts that apps may call. Pure: settings in, an answer to "may it" out.

A host has one spelling here: lower case, no dot at its end, an address in its shortest form, a name
outside ASCII only as `xn--…` (RFC 5891). Two readers of `example.org.`, `127.1` or `Straße.de`
could mean two hosts, so what is spelt otherwise is refused and not mended.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from gateway.errors import BadRequestError, GatewayConfigurationError
from gateway.settings import DestinationSettings, OutboundSettings
from policies.model import Purpose

_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII).fullmatch
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII).fullmatch
# WHATWG URL section 3.5: getaddrinfo reads `127.1` and `0x7f000001` as addresses.
_NUMERIC = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)", re.ASCII).fullmatch
_MAX_HOST = 253
_MAX_PORT = 65_535
_WILDCARD = "*."


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a call goes. `host` is in its one spelling."""

    host: str
    port: int
    encrypted: bool


def parse_host(text: str) -> str:
    """Return a host in its one spelling. Raises `BadRequestError` for anything else."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        name = text.lower()
        if len(name) > _MAX_HOST or not _NAME(name) or _NUMERIC(name.rpartition(".")[2]):
            raise BadRequestError(
                "A host must be a name in ASCII (xn--… for others) without a dot at its end, or an "
                "IP address in its usual form."
            ) from None
        return name
    if getattr(address, "scope_id", None) is not None:
        raise BadRequestError("An address with a zone means another host on every machine.")
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_authority(text: str, *, default_port: int | None) -> tuple[str, int]:
    """Return host and port of `host[:port]` (RFC 3986 section 3.2, without user information).

    Raises `BadRequestError`. Without `default_port` the port must be there.
    """
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        host, port = host + bracket, rest.removeprefix(":")
        well_formed = bracket == "]" and (not rest or rest.startswith(":"))
    else:
        host, colon, port = text.partition(":")
        well_formed = not colon or bool(port)
    if not well_formed or (not port and default_port is None):
        raise BadRequestError("The address of a call must be host:port.")
    if port and not (_PORT(port) and int(port) <= _MAX_PORT):
        raise BadRequestError("The port of a call must be a number from 1 to 65535.")
    return parse_host(host), int(port) if port else default_port or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What the list says to one app about one host. `exact`: it stands there by its own name."""

    purposes: frozenset[Purpose] = frozenset()
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The list, ready to be asked."""

    entries: tuple[DestinationSettings, ...]

    def look_up(self, app: str, host: str, port: int) -> Listed:
        """Return for which purposes `app` may call; none if nothing lists it."""
        matching = [
            entry
            for entry in self.entries
            if entry.port == port
            and (not entry.apps or app in entry.apps)
            and _matches(entry.host, host)
        ]
        return Listed(
            purposes=frozenset(purpose for entry in matching for purpose in entry.purposes),
            exact=any(entry.host == host for entry in matching),
        )

    def names_exactly(self, host: str, port: int) -> bool:
        """Whether an entry, of whichever app, spells this host and port out."""
        return any(entry.host == host and entry.port == port for entry in self.entries)


def _matches(listed: str, host: str) -> bool:
    if not listed.startswith(_WILDCARD):
        return listed == host
    # An address is below no name.
    return host.endswith(listed[1:]) and len(host) >= len(listed) and ":" not in host


def compile_listing(settings: OutboundSettings) -> Listing:
    """Check the list and spell it in the one way.

    Raises `GatewayConfigurationError` for a host that cannot be meant, for a wildcard over a whole
    top-level domain, and for an app that does not exist: a typing error must not be found out by
    an outage, or by a leak.
    """
    known = {app.name for app in settings.apps}
    entries = []
    for entry in settings.destinations:
        unknown = sorted(set(entry.apps) - known)
        if unknown:
            raise GatewayConfigurationError(
                f"gateway.outbound.destinations: {entry.host} is listed for {unknown[0]}, which is "
                "not one of gateway.outbound.apps; correct the name or add the app."
            )
        entries.append(
            DestinationSettings(
                host=_listed_host(entry.host),
                port=entry.port,
                purposes=entry.purposes,
                apps=entry.apps,
            )
        )
    return Listing(entries=tuple(entries))


def _listed_host(text: str) -> str:
    wildcard = text.startswith(_WILDCARD)
    try:
        host = parse_host(text.removeprefix(_WILDCARD))
    except BadRequestError as error:
        raise GatewayConfigurationError(
            f"gateway.outbound.destinations: {text!r} is no host. {error}"
        ) from error
    if wildcard and ("." not in host or host.replace(".", "").isdecimal() or ":" in host):
        raise GatewayConfigurationError(
            f"gateway.outbound.destinations: {text!r} covers far more than one organisation; put "
            "at least two labels after the star, such as *.example.org."
        )
    return _WILDCARD + host if wildcard else host
