"""Which addresses a name may lead to. The last check before a connection is made.

A name on the list can lead anywhere: whoever runs its DNS decides. Addresses of this machine, of
its network link (where clouds keep the credentials of the machine) and of nobody are therefore
refused, unless the operator listed that very address and port, or `localhost` (RFC 6761 section
6.3). What was checked is what is connected to: nothing resolves the name a second time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final, Protocol

from gateway.errors import UpstreamError
from gateway.outbound.listing import Listing

#: Returns all addresses of a name, as text. Raises `OSError`.
type Resolve = Callable[[str, int], Awaitable[list[str]]]

LOCALHOST: Final = "localhost"
# Metadata services that are not link-local: of Amazon over IPv6, of Alibaba.
_METADATA: Final = frozenset({"fd00:ec2::254", "100.100.100.200"})
# RFC 6052 and 6to4 (RFC 3056): addresses that lead to an IPv4 address inside them.
_NAT64: Final = IPv6Network("64:ff9b::/96")
_EMBEDDED_BITS: Final = 0xFFFF_FFFF


class AddressRefusedError(UpstreamError, OSError):
    """A name leads where nothing may be called. It is also an error of the connection."""

    code = "gateway.address_refused"


def is_special(address: str) -> bool:
    """Whether an address is this machine's, its link's, a metadata service's, or no host's."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return True
    inner = _inner(parsed)
    return (
        parsed.is_loopback
        or parsed.is_link_local
        or parsed.is_unspecified
        or parsed.is_multicast
        or (parsed.is_reserved and inner is None)
        or str(parsed) in _METADATA
        or (inner is not None and is_special(str(inner)))
    )


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & _EMBEDDED_BITS)
    return address.ipv4_mapped or address.sixtofour


class AddressCheck(Protocol):
    """Says which addresses a call may go to."""

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host`. Raises `AddressRefusedError` if any may not be called."""
        ...

    def verify(self, host: str, port: int, address: str) -> None:
        """Raise `AddressRefusedError` unless a call of `host` may go to `address`."""
        ...


class CheckedResolver:
    """Resolves names to addresses that may be called."""

    def __init__(self, listing: Listing, resolve: Resolve | None = None) -> None:
        self._listing = listing
        self._resolve = resolve or system_resolve

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host`. Raises `AddressRefusedError` if any may not be called.

        One bad address among good ones refuses all: which of them is tried is nobody's to choose.
        """
        addresses = await self._resolve(host, port)
        if not addresses:
            raise AddressRefusedError("The host outside has no address.")
        for address in addresses:
            self.verify(host, port, address)
        return addresses

    def verify(self, host: str, port: int, address: str) -> None:
        """Raise `AddressRefusedError` unless a call of `host` may go to `address`."""
        if not is_special(address):
            return
        if host in {LOCALHOST, address} and self._listing.names_exactly(host, port):
            return
        raise AddressRefusedError(
            "The host outside leads to an address of this machine or network link. If that is "
            "meant, list the address itself."
        )


async def system_resolve(host: str, port: int) -> list[str]:
    """Ask the system, in a thread."""
    found = await asyncio.to_thread(
        socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
