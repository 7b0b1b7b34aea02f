"""The FHIR app behind, as far as one exchange needs it: requests in its form, answers in ours.

The app is asked for JSON, in full and without conditions; what it answers is believed only if it is
of the kind that was asked for. Its own addresses become the gateway's. Its words about errors are
not passed on: they may quote content.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from gateway import json_text
from gateway.core.commands import Fetched
from gateway.core.enforcement import Enforcement, Steps
from gateway.core.messages import Headers, RequestHead
from gateway.errors import BadRequestError, UpstreamContentError, UpstreamError
from gateway.fhir.resources import Json
from gateway.routes import upstream_path

FHIR_JSON: Final = "application/fhir+json"
FORM: Final = "application/x-www-form-urlencoded"
#: What a client says about the form of an answer, its age or its parts is carried out here.
_OURS: Final = frozenset(
    {"accept", "content-type", "content-length", "prefer", "if-match", "if-none-match",
     "if-modified-since", "if-unmodified-since", "if-none-exist", "if-range", "range"}
)  # fmt: skip
#: Of headers beginning with `x-` only these: others make some apps delete more, write history anew,
#: or act for somebody else.
_HARMLESS: Final = frozenset({"x-request-id", "x-correlation-id"})
_PLACE: Final = re.compile(
    r"(?:.*/)?([A-Z][A-Za-z]{1,47})/([A-Za-z0-9\-.]{1,64})(?:/_history/([A-Za-z0-9\-.]{1,64}))?"
).fullmatch
_ID: Final = re.compile(r"[A-Za-z0-9\-.]{1,64}").fullmatch
_ETAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{1,128}"').fullmatch
_DOTS: Final = re.compile(r"(?:^|/)\.{1,2}(?:/|$)").search
_MAX_STATUS: Final = 599


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A resource as the app keeps it, with what its headers say."""

    resource: Json = field(repr=False)
    etag: str | None = None
    modified: str | None = None


class App:
    """See the module."""

    def __init__(self, enforcement: Enforcement) -> None:
        head, route = enforcement.head, enforcement.route
        self._enforcement = enforcement
        self.base = f"{head.scheme}://{head.authority}{route.base}"
        self._prefix = upstream_path(route, f"{route.base}/").rstrip("/")
        self._hosts = {route.upstream_authority.lower(), head.authority.lower()}
        self._headers = head.headers.without(_OURS | _odd(head.headers))
        self._handling = _handling(head.headers.get("prefer"))

    # --- Asking -----------------------------------------------------------------------------------

    def get(self, path: str, query: str = "") -> Steps[Fetched]:
        """Read from the app."""
        return (yield from self._send("GET", path, query=query))

    def post_form(self, path: str, form: str) -> Steps[Fetched]:
        """A search whose parameters stand in the body."""
        return (yield from self._send("POST", path, body=form.encode(), kind=FORM))

    def change(
        self,
        method: str,
        path: str,
        content: Json | None = None,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Steps[Fetched]:
        """Send what changes something, and ask for the record as it then is."""
        body = b"" if content is None else json_text.dumps(content)
        kind = None if content is None else FHIR_JSON
        extra = {"prefer": "return=representation"}
        if if_match is not None:
            extra["if-match"] = if_match
        if if_none_match is not None:
            extra["if-none-match"] = if_none_match
        return (yield from self._send(method, path, body=body, kind=kind, extra=extra))

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: str = "",
        body: bytes = b"",
        kind: str | None = None,
        extra: dict[str, str] | None = None,
    ) -> Steps[Fetched]:
        headers = self._headers.with_("accept", FHIR_JSON)
        if kind is not None:
            headers = headers.with_("content-type", kind)
        if self._handling is not None:
            headers = headers.with_("prefer", self._handling)
        for name, value in (extra or {}).items():
            headers = headers.with_(name, value)
        own = self._enforcement.head
        head = RequestHead(
            method=method,
            authority=own.authority,
            path=path,
            query=query,
            headers=headers,
            client=own.client,
            scheme=own.scheme,
            http_version=own.http_version,
        )
        return (yield from self._enforcement.fetch(head, body))

    def read(self, kind: str, one: str, version: str | None = None) -> Steps[Found | None]:
        """One record, or None if the app has none. Raises if it gives another, or no FHIR."""
        path = f"/{kind}/{one}" + (f"/_history/{version}" if version else "")
        fetched = yield from self.get(path)
        if fetched.head.status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
            return None
        resource = parse(fetched)
        if resource["resourceType"] != kind or resource.get("id") != one:
            raise UpstreamContentError("The application answered with another record.")
        return found(resource, fetched.head.headers)

    # --- Addresses --------------------------------------------------------------------------------

    def below(self, url: str) -> tuple[str, str] | None:
        """Path and query of a link of the app below its base; None if it leads elsewhere."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return None
        if not url or (parts.netloc and parts.netloc.lower() not in self._hosts):
            return None
        if parts.scheme not in {"", "http", "https"} or _DOTS(parts.path) or "%" in parts.path:
            return None
        path = parts.path
        if path.startswith("/"):
            for prefix in (self._prefix, self._enforcement.route.base):
                if path == prefix or path.startswith(f"{prefix}/"):
                    return path.removeprefix(prefix) or "/", parts.query
            return None
        return f"/{path}", parts.query

    def full_url(self, entry: Json, kind: str, one: str | None) -> str | None:
        """The address of an entry: the gateway's, or a name that is no address."""
        if one is not None:
            return f"{self.base}/{kind}/{one}"
        given = entry.get("fullUrl")
        return given if isinstance(given, str) and given.startswith("urn:") else None


def parse(fetched: Fetched) -> Json:
    """The resource of an answer. Raises for errors and for what is no FHIR JSON."""
    check_status(fetched)
    kinds = fetched.head.headers.all("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind not in {FHIR_JSON, "application/json"}:
        raise UpstreamContentError("The application did not answer with FHIR as JSON.")
    try:
        content = json_text.loads(fetched.body)
    except ValueError as error:
        raise UpstreamContentError("The application's answer is not JSON.") from error
    if not isinstance(content, dict) or not isinstance(content.get("resourceType"), str):
        raise UpstreamContentError("The application's answer is not a FHIR resource.")
    return content


def check_status(fetched: Fetched) -> None:
    """Raise what an error of the app means to the client, in our words."""
    status = fetched.head.status
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return
    if status == HTTPStatus.UNAUTHORIZED:
        raise UpstreamError("The application does not accept the gateway's word for who asks.")
    if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise BadRequestError(
            "The application behind did not accept this request. What it said is not passed on, "
            "for it may quote content; check the request against FHIR R4 and its profiles.",
            status=status,
        )
    if HTTPStatus.INTERNAL_SERVER_ERROR <= status <= _MAX_STATUS:
        raise UpstreamError("The application behind failed.")
    raise UpstreamContentError("The application answered with a redirect or an unknown status.")


def found(resource: Json, headers: Headers) -> Found:
    """A resource with those of its headers that can be believed."""
    etag = headers.get("etag")
    return Found(
        resource=resource,
        etag=etag if etag is not None and _ETAG(etag) else None,
        modified=headers.get("last-modified"),
    )


def is_id(value: Any) -> bool:
    """Whether it has the form of an id or a version (FHIR R4 section 2.24.0.1)."""
    return isinstance(value, str) and _ID(value) is not None


def place(location: Any) -> tuple[str, str, str | None] | None:
    """Type, id and version that a Location names."""
    if not isinstance(location, str):
        return None
    match = _PLACE(location.partition("?")[0])
    return (match[1], match[2], match[3]) if match else None


def _odd(headers: Headers) -> frozenset[str]:
    """Names of headers that mean what only some apps know."""
    return frozenset(
        name
        for name, _ in headers
        # The core has written these anew.
        if name.startswith("x-") and name not in _HARMLESS and not name.startswith("x-forwarded-")
    )


def _handling(prefer: str | None) -> str | None:
    """Of what a client prefers only how strictly parameters are read is the app's business."""
    for part in (prefer or "").replace(";", ",").split(","):
        if part.strip().lower() in {"handling=strict", "handling=lenient"}:
            return part.strip().lower()
    return None
