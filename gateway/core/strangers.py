"""How many refusals of somebody unknown are written into the log, one by one.

Each is two durable entries, and anybody may cause them: without a bound a stranger could fill the
disk, and a log that is full stops everything. What is beyond the bound is refused all the same; it
is counted, and the next entry about that address says how many there were in `counts.unlogged`.

Pure but for its own memory, which is bounded. One per worker.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Final

#: Refusals of one address that are written at once, and how many more each second.
ADDRESS_BURST: Final = 100
ADDRESS_PER_S: Final = 2.0
#: The same for all addresses together: a stranger may have many.
ALL_BURST: Final = 2_000
ALL_PER_S: Final = 50.0
#: Addresses that are remembered. One that is forgotten begins anew.
MAX_ADDRESSES: Final = 8_192
#: A household or a host has a whole IPv6 network of this length (RFC 6177).
_NETWORK_BITS: Final = 64


@dataclass(slots=True)
class _Allowance:
    left: float
    seen_at: float
    unlogged: int = 0

    def refill(self, now: float, *, burst: float, per_s: float) -> None:
        # A clock that steps back gives nothing, and takes nothing.
        self.left = min(burst, self.left + max(0.0, now - self.seen_at) * per_s)
        self.seen_at = now


@dataclass(slots=True)
class Strangers:
    """Keeps count. `now` is Unix time in seconds."""

    _known: OrderedDict[str, _Allowance] = field(default_factory=OrderedDict)
    _all: _Allowance = field(default_factory=lambda: _Allowance(ALL_BURST, 0.0))

    def admit(self, address: str | None, now: float) -> int | None:
        """None if this refusal is not to be written; else how many were not, since the last."""
        one = self._allowance(_network(address), now)
        one.refill(now, burst=ADDRESS_BURST, per_s=ADDRESS_PER_S)
        self._all.refill(now, burst=ALL_BURST, per_s=ALL_PER_S)
        if one.left < 1 or self._all.left < 1:
            one.unlogged += 1
            return None
        one.left -= 1
        self._all.left -= 1
        unlogged, one.unlogged = one.unlogged, 0
        return unlogged

    def _allowance(self, name: str, now: float) -> _Allowance:
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = _Allowance(ADDRESS_BURST, now)
            if len(self._known) > MAX_ADDRESSES:
                self._known.popitem(last=False)
        self._known.move_to_end(name)
        return known


def _network(address: str | None) -> str:
    try:
        found = ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(found, IPv6Address) and found.ipv4_mapped is None:
        return f"{int(found) >> (128 - _NETWORK_BITS):x}"
    return str(getattr(found, "ipv4_mapped", None) or found)
