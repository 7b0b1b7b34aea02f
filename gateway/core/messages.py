"""HTTP messages as the core sees them: already parsed, never yet trusted.

Names of headers are lower case, their order and repetitions are kept. A target is kept as it came
(percent-encoded): two readers of a decoded path could see two different paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Headers:
    """Header fields in order. Names are lower case."""

    fields: tuple[tuple[str, str], ...] = ()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Give all fields, repetitions included."""
        return iter(self.fields)

    def get(self, name: str) -> str | None:
        """The value of a field that stands once; with repetitions, the first."""
        return next((value for key, value in self.fields if key == name), None)

    def all(self, name: str) -> list[str]:
        """All values of a field, in order."""
        return [value for key, value in self.fields if key == name]

    def without(self, names: Iterable[str]) -> Headers:
        """The same without some fields."""
        gone = frozenset(names)
        return Headers(tuple(pair for pair in self.fields if pair[0] not in gone))

    def with_(self, name: str, value: str) -> Headers:
        """The same with one field in place of all of that name."""
        return Headers((*self.without((name,)).fields, (name, value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """The first part of a request.

    `authority` is host and, if given, port, from `Host` or `:authority`. `path` begins with a
    slash; `query` is without the question mark. `client` is the address of whoever connected.
    """

    method: str
    authority: str
    path: str
    query: str = field(default="", repr=False)
    headers: Headers = field(default=Headers(), repr=False)
    client: str | None = field(default=None, repr=False)
    scheme: str = "https"
    http_version: str = "1.1"

    @property
    def target(self) -> str:
        """Path and query as they go on the wire."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def with_headers(self, headers: Headers) -> RequestHead:
        """The same request with other header fields."""
        return replace(self, headers=headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """The first part of an answer."""

    status: int
    headers: Headers = field(default=Headers(), repr=False)
