"""Searches of the gateway's own: what a FHIR app knows of relations and consents.

An answer that cannot be had is `UnusableError`, one that is there but cannot be relied upon is
None; of that the operator is told once. FHIR R4, http.html#search. Before: `gateway.facts` and
`gateway.consents`; what is in an answer is read by `gateway.relations`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlencode

import orjson
import structlog

from gateway.core.commands import Failed, Fetched
from gateway.core.messages import Headers, RequestHead
from gateway.relations import (
    UnreadableError,
    is_all,
    next_link,
    own_target,
    resources_of,
    verify_filtered,
)
from gateway.routes import Route, upstream_path

_log = structlog.get_logger("gateway")

type Fetch = Callable[[Route, RequestHead, bytes, int], Awaitable[Fetched | Failed]]

MAX_PAGES: Final = 20
PAGE_SIZE: Final = 200
MAX_ANSWER_BYTES: Final = 8_388_608

NOT_HAD: Final = Failed(
    code="gateway.facts",
    who="upstream",
    message="The app that knows care teams and consents does not answer the gateway's questions.",
)
_REMEDIES: Final = {
    "Consent": "make the app answer Consent?patient=…, or, if it has no such records, write "
    'patient_consents = "none" in its route',
}
_KEPT_OUT: Final = frozenset({
    HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS,
})  # fmt: skip


class UnusableError(Exception):
    """The app's answer cannot be had."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.code)
        self.failed = failed


class Searches:
    """Asks apps. `fetch` sends a request to a route's app as it is: its path is the app's own."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        #: Of what the operator was told once.
        self._told: set[tuple[str, str]] = set()

    async def search(
        self,
        source: Route,
        type_: str,
        parameters: dict[str, str],
        *,
        wanted: frozenset[str] = frozenset(),
        trial: bool = False,
    ) -> list[dict[str, Any]] | None:
        """All resources of a search, or None if they cannot be told.

        The first of the parameters is the one that the app must have taken into account, with all
        of `wanted`. Of a `trial`, after which it is asked otherwise, the operator is told nothing.
        Raises `UnusableError`.
        """
        path = upstream_path(source, f"{source.base}/{type_}")
        query = urlencode({**parameters, "_count": str(PAGE_SIZE)}, safe=",")
        found: list[dict[str, Any]] = []
        try:
            for number in range(MAX_PAGES):
                bundle = await self._page(source, path, query)
                if number == 0:
                    # Later pages may be known by a name that says nothing about parameters.
                    verify_filtered(bundle, next(iter(parameters)), wanted)
                found += resources_of(bundle, type_)
                link = next_link(bundle)
                if link is None:
                    if is_all(bundle, len(found)):
                        return found
                    break
                path, query = own_target(source.upstream_base, link, path)
        except UnreadableError as error:
            answered = str(error)
        else:
            answered = ""
        if not trial:
            self.tell(source, type_, answered)
        return None

    def tell(self, source: Route, type_: str, answered: str) -> None:
        """Tell the operator, once for each route and type, why everything is closed."""
        if (source.name, type_) in self._told:
            return
        self._told.add((source.name, type_))
        _log.warning(
            "gateway.facts_unreadable",
            service=source.name,
            type=type_,
            answered=answered or "no whole searchset",
            counts_as="a consent that cannot be read" if type_ == "Consent" else "no relation",
            remedy=_REMEDIES.get(type_, "see the app's search for this type"),
        )

    async def _page(self, source: Route, path: str, query: str) -> dict[str, Any]:
        head = RequestHead(
            method="GET",
            authority=source.upstream_authority,
            path=path,
            query=query,
            headers=Headers((("accept", "application/fhir+json"),)),
            scheme=source.upstream_scheme,
        )
        answer = await self._fetch(source, head, b"", MAX_ANSWER_BYTES)
        if isinstance(answer, Failed):
            raise UnusableError(answer)
        status = answer.head.status
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _KEPT_OUT:
            raise UnusableError(NOT_HAD)
        if status != HTTPStatus.OK:
            raise UnreadableError(f"status {status}")
        try:
            bundle = orjson.loads(answer.body)
        except orjson.JSONDecodeError as error:
            raise UnreadableError from error
        if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
            raise UnreadableError
        return bundle
