"""The form of an answer: what a client wants of a record, headers, what it has already.

Nothing is decided here; what comes in has been released.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from http import HTTPStatus
from typing import Final

from gateway import json_text
from gateway.core.enforcement import Reply
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import UnsupportedError
from gateway.fhir.change import Changed
from gateway.fhir.pages import Place
from gateway.fhir.query import Controls, encoded
from gateway.fhir.release import elements, notice_text
from gateway.fhir.request import Interaction, Parameters
from gateway.fhir.resources import Json
from gateway.fhir.transaction import outcome

_JSON: Final = "application/fhir+json; charset=utf-8"
#: As it stands in ciphertext, index tokens and pseudonyms, and in our names.
_SEALED: Final = re.compile(r"\bhg[a-z]?[0-9]\.|havengate\.internal", re.IGNORECASE)
_CHANGES: Final = frozenset({"create", "update", "patch", "delete"})
_SUBSETTED: Final = {
    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue",
    "code": "SUBSETTED",
}


def reply(head: RequestHead, asked: Interaction, done: Changed, notices: Collection[str]) -> Reply:
    """The answer to one interaction. `notices`: of what was released with it."""
    fields = [
        (name, value)
        for name, value in (
            ("etag", done.etag),
            ("last-modified", done.modified),
            ("location", done.location),
        )
        if value is not None
    ]
    if notices and done.content is not None:
        texts = (" ".join(notice_text(one).split()) for one in sorted(notices))
        fields.append(("redisclosure-notice", " ".join(texts)))
    if asked.name in {"read", "vread"} and _unchanged(head.headers, done):
        return _made(HTTPStatus.NOT_MODIFIED, fields, None)
    minimal = asked.name in _CHANGES and _prefers_minimal(head.headers)
    content = None if minimal else done.content
    return _made(done.status, fields, content, bodiless=head.method == "HEAD")


def reduced(content: Json, how: Controls) -> Json:
    """The part of a released record that the client wants."""
    if how.elements:
        return elements(content, how.elements)
    if how.summary == "text":
        return elements(content, frozenset({"text"}))
    if how.summary in {"data", "true"} and "text" in content:
        meta = content.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        tags = [one for one in meta.get("tag") or [] if one != _SUBSETTED]
        rest = {name: value for name, value in content.items() if name != "text"}
        return {**rest, "meta": {**meta, "tag": [*tags, _SUBSETTED]}}
    return content


def passing(path: str, parameters: Parameters, known: frozenset[str], how: Controls) -> Place:
    """A request with the parameters that are known to look at nothing that may be hidden."""
    if any(name not in known and not name.startswith("_") for name, _ in parameters):
        raise UnsupportedError(f"Offered here are {', '.join(sorted(known))}.")
    orders = {value for name, value in parameters if name == "_sort"}
    if not orders <= {"_lastUpdated", "-_lastUpdated", "none"}:
        # By anything else it could tell what is hidden.
        raise UnsupportedError("Versions are sorted by _lastUpdated alone.")
    passed = [(n, v) for n, v in parameters if n in known and n != "_count"]
    return Place(path=path, query=encoded([*passed, ("_count", str(how.count + 1))]))


def joined(query: str, more: Parameters) -> str:
    """A query with more parameters."""
    return "&".join(part for part in (query, encoded(more)) if part)


def said(text: str) -> Json:
    """An entry in which the gateway itself says something about the answer."""
    content = outcome("incomplete", text, severity="warning")
    return {"resource": content, "search": {"mode": "outcome"}}


def told_issue(issue: Json) -> Json:
    """What a validator says, without the narrative that may show more.

    It sees ciphertext and index tokens; an issue that quotes them keeps only what kind it is.
    """
    names = ("severity", "code", "details", "diagnostics", "location", "expression")
    told = {name: issue[name] for name in names if name in issue}
    if _SEALED.search(json_text.dumps(told).decode()):
        return {name: told[name] for name in ("severity", "code") if name in told}
    return told


def _unchanged(headers: Headers, done: Changed) -> bool:
    """Whether the client has this already (RFC 9110 section 13.1)."""
    known = headers.get("if-none-match")
    if known is not None:
        tags = {one.strip().removeprefix("W/") for one in known.split(",")}
        return done.etag is not None and ("*" in tags or done.etag.removeprefix("W/") in tags)
    since = headers.get("if-modified-since")
    return since is not None and since == done.modified


def _prefers_minimal(headers: Headers) -> bool:
    wishes = ",".join(headers.all("prefer")).replace(";", ",").lower().split(",")
    return not {one.strip() for one in wishes}.isdisjoint(
        {"return=minimal", "return=operationoutcome"}
    )


def _made(
    status: int,
    fields: list[tuple[str, str]],
    content: Json | None,
    *,
    bodiless: bool = False,
) -> Reply:
    body = b"" if content is None else json_text.dumps(content)
    if content is not None:
        fields = [("content-type", _JSON), *fields]
    head = ResponseHead(status=int(status), headers=Headers(tuple(fields)))
    return Reply(head=head, body=b"" if bodiless else body)
