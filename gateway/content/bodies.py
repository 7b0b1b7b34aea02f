"""Bodies and header fields of inspected JSON exchanges. Pure.

JSON is read so that nobody could read it otherwise (no member twice, no NaN) and always written
anew: what goes on is what was looked at, not the bytes that came.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_to_bytes

from gateway import json_text
from gateway.content.pointers import JSON, Pointer
from gateway.core.messages import Headers, RequestHead
from gateway.errors import BadRequestError, UnsupportedError
from gateway.routes import Route, client_location

JSON_TYPE: Final = "application/json"
#: JSON Patch names places by pointers of its own, which no rule has been checked against.
_PATCH_TYPE: Final = "application/json-patch+json"
#: They speak of one stored form; what is inspected has another. And parts cannot be decided upon.
_CONDITIONS: Final = frozenset({
    "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "range",
})  # fmt: skip
#: The body is written anew.
_FRAMING: Final = frozenset({
    "content-length", "transfer-encoding", "content-encoding", "content-md5", "digest",
    "content-digest", "repr-digest", "expect",
})  # fmt: skip
_OVERRIDES: Final = frozenset({
    "x-http-method-override", "x-http-method", "x-method-override",
})  # fmt: skip
#: What of an answer's head says nothing about records that may have been left out.
_RELEASED: Final = frozenset({"content-type", "content-language", "content-disposition"})
#: What apps merge with the parameters of the query.
_FORMS: Final = frozenset({"application/x-www-form-urlencoded", "multipart/form-data"})
_METHOD: Final = "_method"
_NO_WORD = re.compile(r"[\W_]").sub
_OWN_COOKIE: Final = "__host-havengate"


# --- Requests -------------------------------------------------------------------------------------


def check_method(head: RequestHead) -> None:
    """Raise `BadRequestError` if the request asks the app to take its method for another."""
    if any(name in _OVERRIDES for name, _ in head.headers) or any(
        name == _METHOD for name, _ in parameters(head.query)
    ):
        raise BadRequestError("Send the method itself, not one that stands for another.")


def check_body(head: RequestHead, content: JSON, body: bytes) -> None:
    """The same for what the body says: a member of JSON or a field of a form."""
    member = isinstance(content, dict) and _METHOD in content
    if member or (is_form(head) and _METHOD.encode() in unquote_to_bytes(body)):
        raise BadRequestError("Send the method itself, not one that stands for another.")


def is_form(head: RequestHead) -> bool:
    """Whether the body is a form by its `Content-Type`."""
    return any(media_type(one) in _FORMS for one in head.headers.all("content-type"))


def parameters(query: str) -> list[tuple[str, str]]:
    """The parameters of a query, decoded. Raises `BadRequestError` beyond 1,000."""
    try:
        return parse_qsl(query, keep_blank_values=True, max_num_fields=1_000)
    except ValueError as error:
        raise BadRequestError("Expected at most 1,000 parameters in the query.") from error


def parameter(query: str, name: str) -> str | None:
    """The value of a parameter that decides.

    Raises `BadRequestError` if it stands twice, or beside a spelling that an app may take for it.
    """
    alike = [
        pair
        for pair in parameters(query.replace(";", "&"))
        if not _plain(pair[0]).isdisjoint(_plain(name))
    ]
    if not alike:
        return None
    if len(alike) > 1 or alike[0][0] != name or (name, alike[0][1]) not in parameters(query):
        raise BadRequestError(f"Expected the parameter “{name}” once, and in this spelling.")
    return alike[0][1]


def _plain(name: str) -> set[str]:
    """What apps may take a name for: to some `a.b`, `a b` and `a[b` are `a_b`, and `a[]` is `a`."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return {_NO_WORD("", one) for one in (text, text.partition("[")[0], text.partition("\0")[0])}


def parse_request(head: RequestHead, body: bytes) -> tuple[JSON, bool]:
    """The body of a request as JSON, and whether it is JSON at all.

    Raises `BadRequestError` for JSON that cannot be relied upon, `UnsupportedError` for codings.
    """
    if not body:
        return None, False
    if head.headers.get("content-encoding") not in {None, "identity"}:
        raise UnsupportedError("Send the body without a content coding.", status=415)
    types = head.headers.all("content-type")
    if len(types) != 1 or not is_json(types[0]):
        return None, False
    if media_type(types[0]) == _PATCH_TYPE:
        raise UnsupportedError("Send a merge patch (RFC 7396), not a JSON Patch.", status=415)
    try:
        return parse_json(body), True
    except ValueError as error:
        raise BadRequestError("Expected well-formed JSON with each member once.") from error


def upstream_head(head: RequestHead, *, query: str, reading: bool) -> RequestHead:
    """The request as the app is asked: as a whole, and for a read without conditions."""
    gone = _FRAMING | _CONDITIONS | {"content-type"} if reading else _FRAMING | {"range"}
    headers = head.headers.without(gone)
    return replace(head, method="GET" if reading else head.method, query=query, headers=headers)


# --- JSON -----------------------------------------------------------------------------------------


def media_type(content_type: str | None) -> str:
    """The media type without parameters, in lower case."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_json(content_type: str | None) -> bool:
    """Whether a `Content-Type` says JSON (RFC 8259, RFC 6839 section 3.1)."""
    kind = media_type(content_type)
    return kind == JSON_TYPE or (kind.startswith("application/") and kind.endswith("+json"))


def parse_json(body: bytes) -> JSON:
    """Read UTF-8 JSON.

    Raises ValueError, also for a member that stands twice, NaN, numbers out of range, and depth.
    """
    try:
        return json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_members,
            parse_constant=json_text.refuse_constant,
            parse_float=json_text.numeral,
            parse_int=json_text.numeral,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def dump_json(value: JSON) -> bytes:
    """Write JSON. Halves of surrogate pairs, which UTF-8 does not know, stay escaped."""
    try:
        return json_text.dumps(value)
    except TypeError:
        return json_text.dumps_escaped(value)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def envelope(body: JSON, items: Pointer, kept: Sequence[Pointer], listed: list[JSON]) -> JSON:
    """An answer with a list, and of what stands beside the list only what was named."""
    made: dict[str, Any] = {}
    _put(made, items.steps, listed)
    for pointer in kept:
        for value in pointer.find(body):
            _put(made, pointer.steps, value)
    return made


def put(body: dict[str, Any], pointer: Pointer, value: JSON) -> None:
    """Set a member of an answer that `envelope` made."""
    _put(body, pointer.steps, value)


def _put(body: dict[str, Any], steps: tuple[str, ...], value: JSON) -> None:
    *way, last = steps
    for step in way:
        body = body.setdefault(step, {})
    body[last] = value


# --- Answers --------------------------------------------------------------------------------------


def released_headers(headers: Headers, route: Route, *, location: bool = False) -> Headers:
    """What of the head of an app's answer may leave with its content."""
    kept = [(name, value) for name, value in headers if name in _RELEASED]
    kept += [
        (name, value)
        for name, value in headers
        if name == "set-cookie" and not value.lstrip(" \t=").lower().startswith(_OWN_COOKIE)
    ]
    target = headers.get("location")
    if location and target is not None:
        kept.append(("location", client_location(route, target)))
    return Headers(tuple(kept))


def not_modified(head: RequestHead, etag: str | None) -> bool:
    """Whether the client has exactly this already (RFC 9110 section 13.1.2)."""
    asked = head.headers.get("if-none-match")
    if asked is None or etag is None:
        return False
    known = {one.strip().removeprefix("W/") for one in asked.split(",")}
    return etag.removeprefix("W/") in known


def problem(status: int) -> bytes:
    """The body in place of one of the app's that says what went wrong: it may quote records."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Refused"
    return dump_json({"type": "about:blank", "title": title, "status": status})
