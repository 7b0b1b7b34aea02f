"""Paging links of the app, given to clients in a form that says nothing and fits nobody else."""

from __future__ import annotations


class Pager:
    """Seals and opens links under a key."""

    def __init__(self, key: bytes) -> None:
        raise NotImplementedError

    def seal(self, link: str, *, principal: str, route: str, now: float) -> str:
        """A URL-safe text that only the same principal on the same route can have opened."""
        raise NotImplementedError

    def open(self, token: str, *, principal: str, route: str, now: float) -> str:
        """The link again. Raises `BadRequestError`."""
        raise NotImplementedError
