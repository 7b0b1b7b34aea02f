"""Which app a request is for. Pure: settings in, routes out.

What a request to that app means is told by `gateway.fhir.request` or `gateway.content.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from gateway.settings import RouteSettings

#: The gateway's own pages, on every host.
OWN_PREFIX = "/.havengate/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One app, ready to be used. `base` is its path prefix without a slash at the end."""

    settings: RouteSettings = field(repr=False)
    name: str
    base: str
    upstream_scheme: str
    upstream_authority: str
    upstream_base: str


def compile_routes(settings: Sequence[RouteSettings]) -> tuple[Route, ...]:
    """Make routes in the order in which they are tried: named hosts first, longest path first.

    Raises `GatewayConfigurationError` for two routes that nothing distinguishes, and for anything
    else that cannot be meant.
    """
    raise NotImplementedError


def match(routes: Sequence[Route], authority: str, path: str) -> Route | None:
    """The route for a request, or None. A path with dot segments or encoded slashes has none."""
    raise NotImplementedError


def upstream_path(route: Route, path: str) -> str:
    """The path that the app is asked for."""
    raise NotImplementedError


def _parts(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc, parts.path.rstrip("/")
