"""What `havengate check` and `/readyz` say: one line for each thing that must be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gateway.settings import RouteSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at. `says` is one line: how it is or, if it is not good, what to do."""

    what: str
    good: bool
    says: str

    def as_dict(self) -> dict[str, object]:
        """For scripts."""
        return asdict(self)


def shared_host(routes: Sequence[RouteSettings]) -> str | None:
    """One line if apps of different upstreams can be reached under one host, or None.

    To a browser they are then one site: what one app's pages do, they can do to the other.
    """
    for number, one in enumerate(routes):
        for other in routes[number + 1 :]:
            hosts = {one.host.casefold(), other.host.casefold()}
            # A route without a host answers under every one.
            if (len(hosts) == 1 or "" in hosts) and one.upstream != other.upstream:
                return (
                    f"{one.name} and {other.name} share a host, so each one's pages can act in the "
                    "other in the name of whoever looks at them; give each app that you do not "
                    "trust a host of its own"
                )
    return None
