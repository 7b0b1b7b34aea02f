"""FHIR R4 over the store: one request in, one answer out, nothing of HTTP's bytes.

Source: FHIR R4, section 3.1.0 (RESTful API). Left out, and refused rather than guessed: XML,
conditional update and delete, `:iterate`, `_summary` other than `count`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlencode, urlsplit

import jsonpatch
import orjson

from examples.clinic.messages import TYPES, Ask, FHIRError, Reply, metadata
from examples.clinic.search import PARAMETERS, SearchError, order, where
from examples.clinic.store import Resource, Store, Version

_RESULT_PARAMETERS = frozenset(
    {"_count", "_offset", "_sort", "_include", "_revinclude", "_summary"}
)
_IGNORED_PARAMETERS = frozenset({"_format", "_pretty", "_total", "_elements"})
_PAGE, _LARGEST_PAGE = 50, 500
_ORDER = ("DELETE", "POST", "PUT", "PATCH", "GET", "HEAD")


def answer(store: Store, ask: Ask) -> Reply:
    """Carry a request out. Never raises for what a client did."""
    try:
        with store.transaction():
            return _dispatch(store, ask)
    except FHIRError as error:
        return error.reply()
    except SearchError as error:
        return FHIRError(400, "invalid", str(error)).reply()


def _dispatch(store: Store, ask: Ask) -> Reply:  # noqa: C901, PLR0911, PLR0912 - a table
    method = "GET" if ask.method == "HEAD" else ask.method
    match method, ask.path.strip("/").split("/"):
        case "GET", ["metadata"]:
            return _json(200, metadata())
        case "POST", [""]:
            return _bundle(store, ask)
        case _, [kind, *_] if kind not in TYPES:
            raise FHIRError(404, "not-supported", "no such resource type here; see metadata")
        case "GET", [kind]:
            return _search(store, ask, kind, parse_qsl(ask.query, keep_blank_values=True))
        case "POST", [kind, "_search"]:
            query = f"{ask.query}&{ask.body.decode(errors='replace')}"
            return _search(store, ask, kind, parse_qsl(query, keep_blank_values=True))
        case "POST", [kind]:
            return _create(store, ask, kind)
        case "GET", [kind, "_history"]:
            return _history(ask, store.versions(kind))
        case "GET", [kind, name]:
            return _read(ask, store.get(kind, name), store.versions(kind, name))
        case "PUT", [kind, name]:
            return _update(store, ask, kind, name, _parsed(ask.body, kind))
        case "PATCH", [kind, name]:
            return _patch(store, ask, kind, name)
        case "DELETE", [kind, name]:
            return _delete(store, ask, kind, name)
        case "GET", [kind, name, "_history"]:
            return _history(ask, store.versions(kind, name) or _missing())
        case "GET", [kind, name, "_history", number]:
            found = [v for v in store.versions(kind, name) if str(v.version) == number]
            return _read(ask, found[0] if found else None, found)
        case "GET", ["Patient", name, "$everything"]:
            return _everything(store, ask, name)
    raise FHIRError(405, "not-supported", "this interaction is not supported here; see metadata")


# --- One resource ---------------------------------------------------------------------------------


def _read(ask: Ask, found: Version | None, versions: list[Version]) -> Reply:
    if found is None and not versions:
        _missing()
    if found is None or found.body is None:
        raise FHIRError(410, "deleted", "this resource was deleted")
    if ask.headers.get("if-none-match") in {_etag(found), "*"}:
        return Reply(status=304, headers=_about(found))
    return Reply(status=200, headers=_about(found), body=found.body)


def _create(store: Store, ask: Ask, kind: str) -> Reply:
    resource = _parsed(ask.body, kind)
    if "if-none-exist" in ask.headers:
        same = _only(store, kind, ask.headers["if-none-exist"])
        if same is not None:
            return Reply(status=200, headers=_about(same), body=same.body or b"")
    name = ask.new_id or uuid.uuid4().hex
    return _written(ask, store.write(kind, name, resource), 201)


def _update(store: Store, ask: Ask, kind: str, name: str, resource: Resource) -> Reply:
    if resource.get("id") != name:
        raise FHIRError(400, "invalid", "the resource's id has to be that of the URL")
    _check_version(store, ask, kind, name)
    status = 200 if store.get(kind, name) else 201
    return _written(ask, store.write(kind, name, resource), status)


def _patch(store: Store, ask: Ask, kind: str, name: str) -> Reply:
    if not ask.headers.get("content-type", "").startswith("application/json-patch+json"):
        raise FHIRError(415, "not-supported", "a patch has to be application/json-patch+json")
    found = store.get(kind, name) or _missing()
    try:
        patched = jsonpatch.JsonPatch(_loads(ask.body)).apply(orjson.loads(found.body or b""))
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException, TypeError) as error:
        raise FHIRError(422, "processing", "the patch does not apply to this version") from error
    return _update(store, ask, kind, name, patched)


def _delete(store: Store, ask: Ask, kind: str, name: str) -> Reply:
    _check_version(store, ask, kind, name)
    if store.get(kind, name) is None:
        return Reply(status=204)
    return Reply(status=204, headers={"etag": _etag(store.write(kind, name, None))})


def _check_version(store: Store, ask: Ask, kind: str, name: str) -> None:
    wanted = ask.headers.get("if-match")
    found = store.get(kind, name)
    if wanted is not None and (found is None or wanted != _etag(found)):
        raise FHIRError(412, "conflict", "another version is current; read it first")


def _written(ask: Ask, version: Version, status: int) -> Reply:
    place = f"{ask.base}/{version.type}/{version.id}/_history/{version.version}"
    minimal = "return=minimal" in ask.headers.get("prefer", "")
    body = b"" if minimal else version.body or b""
    return Reply(status=status, headers={**_about(version), "location": place}, body=body)


# --- Many resources -------------------------------------------------------------------------------


def _search(store: Store, ask: Ask, kind: str, query: list[tuple[str, str]]) -> Reply:
    query = [(key, value) for key, value in query if key not in _IGNORED_PARAMETERS]
    given = dict(query)
    condition, args = where(
        kind, [(k, v) for k, v in query if k.split(":")[0] not in _RESULT_PARAMETERS]
    )
    counted = f"SELECT count(*) FROM current WHERE {condition}"  # noqa: S608 - no data in it
    count = min(_number(given.get("_count"), _PAGE), _LARGEST_PAGE)
    start = _number(given.get("_offset"), 0)
    links = [{"relation": "self", "url": _url(ask, kind, query)}]
    if given.get("_summary", "false") not in {"false", "count"}:
        raise FHIRError(400, "not-supported", "of _summary only count is supported")
    if given.get("_summary") == "count" or count == 0:
        total = store.database.execute(counted, args).fetchone()[0]
        return _json(200, _set("searchset", total, links))
    ordering, order_args = order(given.get("_sort", ""))
    found = list(
        store.select(
            f"SELECT * FROM current WHERE {condition} ORDER BY {ordering} LIMIT ? OFFSET ?",  # noqa: S608 - no data in it
            [*args, *order_args, count, start],
        )
    )
    total = start + len(found)
    if len(found) == count or (start and not found):
        total = store.database.execute(counted, args).fetchone()[0]
    if start + count < total:
        further = [*((k, v) for k, v in query if k != "_offset"), ("_offset", str(start + count))]
        links.append({"relation": "next", "url": _url(ask, kind, further)})
    entries = [_entry(ask, version, {"mode": "match"}) for version in found]
    entries += [
        _entry(ask, version, {"mode": "include"}) for version in _included(store, found, query)
    ]
    return _json(200, _set("searchset", total, links, entries))


def _included(store: Store, found: list[Version], query: list[tuple[str, str]]) -> list[Version]:
    seen = {(version.type, version.id) for version in found}
    ids = orjson.dumps([version.id for version in found]).decode()
    references = orjson.dumps([f"{version.type}/{version.id}" for version in found]).decode()
    extra: dict[tuple[str, str], Version] = {}
    for key, value in query:
        if key not in {"_include", "_revinclude"}:
            continue
        kind, _, rest = value.partition(":")
        name, _, target = rest.partition(":")
        if kind not in TYPES or name not in PARAMETERS:
            raise FHIRError(400, "invalid", f"{key} has to be Type:reference")
        if key == "_include":
            rows = store.select(
                "SELECT current.* FROM current JOIN term "
                "ON term.value=current.type||'/'||current.id WHERE term.type=? AND param=? "
                "AND term.id IN (SELECT value FROM json_each(?))",
                [kind, name, ids],
            )
        else:
            rows = store.select(
                "SELECT * FROM current WHERE type=? AND id IN (SELECT id FROM term WHERE type=? "
                "AND param=? AND value IN (SELECT value FROM json_each(?)))",
                [kind, kind, name, references],
            )
        extra |= {(v.type, v.id): v for v in rows if not target or v.type == target}
    return [version for place, version in extra.items() if place not in seen]


def _everything(store: Store, ask: Ask, name: str) -> Reply:
    patient = store.get("Patient", name) or _missing()
    about = store.select(
        "SELECT * FROM current WHERE EXISTS (SELECT 1 FROM term WHERE term.type=current.type "
        "AND term.id=current.id AND param='patient' AND value=?) ORDER BY type, id",
        [f"Patient/{name}"],
    )
    entries = [_entry(ask, version, {"mode": "match"}) for version in (patient, *about)]
    return _json(200, _set("searchset", len(entries), [], entries))


def _history(ask: Ask, versions: list[Version]) -> Reply:
    entries = []
    for version in versions:
        method = "DELETE" if version.body is None else "POST" if version.version == 1 else "PUT"
        entry = _entry(ask, version, None)
        entry["request"] = {"method": method, "url": f"{version.type}/{version.id}"}
        entry["response"] = {
            "status": {"POST": "201", "PUT": "200", "DELETE": "204"}[method],
            "etag": _etag(version),
            "lastModified": version.updated,
        }
        entries.append(entry)
    return _json(200, _set("history", len(entries), [], entries))


# --- Bundles --------------------------------------------------------------------------------------


def _bundle(store: Store, ask: Ask) -> Reply:
    bundle = _parsed(ask.body, "Bundle")
    kind, entries = bundle.get("type"), bundle.get("entry", [])
    if kind not in {"batch", "transaction"}:
        raise FHIRError(400, "invalid", "a Bundle to be carried out is a batch or a transaction")
    places = _new_places(store, entries) if kind == "transaction" else {}
    inner = [_inner(ask, entry, places) for entry in entries]
    numbers = sorted(range(len(inner)), key=lambda number: _ORDER.index(inner[number].method))
    replies: dict[int, Reply] = {}
    for number in numbers:
        replies[number] = answer(store, inner[number])
        if kind == "transaction" and replies[number].status >= 400:  # noqa: PLR2004 - HTTP
            issue = orjson.loads(replies[number].body)["issue"][0]
            text = f"entry {number}: {issue['diagnostics']}; nothing was done"
            raise FHIRError(replies[number].status, issue["code"], text)
    answered = [_response_entry(replies[number]) for number in range(len(inner))]
    return _json(200, {"resourceType": "Bundle", "type": f"{kind}-response", "entry": answered})


def _new_places(store: Store, entries: Iterable[Any]) -> dict[str, str]:
    """What is created, by its temporary name: so that entries can refer to each other."""
    places: dict[str, str] = {}
    for entry in entries:
        request = entry.get("request", {})
        if request.get("method") == "POST" and "fullUrl" in entry:
            kind = entry.get("resource", {}).get("resourceType", "")
            same = _only(store, kind, request["ifNoneExist"]) if "ifNoneExist" in request else None
            places[entry["fullUrl"]] = f"{kind}/{same.id if same else uuid.uuid4().hex}"
    return places


def _inner(ask: Ask, entry: Any, places: dict[str, str]) -> Ask:
    request = entry.get("request", {}) if isinstance(entry, dict) else {}
    if request.get("method") not in _ORDER or not isinstance(request.get("url"), str):
        raise FHIRError(400, "structure", "an entry needs request.method and request.url")
    conditions = {
        "ifMatch": "if-match",
        "ifNoneMatch": "if-none-match",
        "ifNoneExist": "if-none-exist",
    }
    headers = {conditions[key]: value for key, value in request.items() if key in conditions}
    place = places.get(entry.get("fullUrl", ""))
    url = urlsplit(request["url"].removeprefix(ask.base))
    return replace(
        ask,
        method=request["method"],
        path=url.path,
        query=url.query,
        headers=headers,
        body=orjson.dumps(_replaced(entry["resource"], places)) if "resource" in entry else b"",
        new_id=place.partition("/")[2] if place else None,
    )


def _replaced(node: Any, places: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(item, places) for item in node]
    return places.get(node, node) if isinstance(node, str) else node


def _response_entry(reply: Reply) -> dict[str, Any]:
    known = {"etag": "etag", "location": "location", "last-modified": "lastModified"}
    response: dict[str, Any] = {"status": str(reply.status)}
    response |= {known[key]: value for key, value in reply.headers.items() if key in known}
    if reply.status >= 400:  # noqa: PLR2004 - HTTP
        return {"response": {**response, "outcome": orjson.Fragment(reply.body)}}
    return (
        {"resource": orjson.Fragment(reply.body), "response": response}
        if reply.body
        else {"response": response}
    )


# --- Small parts ----------------------------------------------------------------------------------


def _missing() -> NoReturn:
    raise FHIRError(404, "not-found", "no such resource here")


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise FHIRError(400, "structure", "the body is no JSON") from None


def _parsed(body: bytes, kind: str) -> Resource:
    resource = _loads(body)
    if not isinstance(resource, dict) or resource.get("resourceType") != kind:
        raise FHIRError(400, "structure", "the body has to be a resource of the URL's type")
    return resource


def _only(store: Store, kind: str, query: str) -> Version | None:
    condition, args = where(kind, parse_qsl(query))
    found = list(store.select(f"SELECT * FROM current WHERE {condition} LIMIT 2", args))  # noqa: S608 - no data in it
    if len(found) > 1:
        raise FHIRError(412, "multiple-matches", "more than one resource is like this")
    return found[0] if found else None


def _number(text: str | None, otherwise: int) -> int:
    if text is not None and not (text.isascii() and text.isdigit()):
        raise FHIRError(400, "invalid", "_count and _offset have to be whole numbers")
    return otherwise if text is None else int(text[:9])


def _etag(version: Version) -> str:
    return f'W/"{version.version}"'


def _about(version: Version) -> dict[str, str]:
    return {"etag": _etag(version)}


def _url(ask: Ask, kind: str, query: list[tuple[str, str]]) -> str:
    return f"{ask.base}/{kind}?{urlencode(query)}" if query else f"{ask.base}/{kind}"


def _entry(ask: Ask, version: Version, search: dict[str, str] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"fullUrl": f"{ask.base}/{version.type}/{version.id}"}
    if version.body is not None:
        entry["resource"] = orjson.Fragment(version.body)
    return {**entry, "search": search} if search else entry


def _set(
    kind: str, total: int, links: list[dict[str, str]], entries: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    bundle: dict[str, Any] = {"resourceType": "Bundle", "type": kind, "total": total}
    return bundle | ({"link": links} if links else {}) | ({"entry": entries} if entries else {})


def _json(status: int, value: Any) -> Reply:
    return Reply(status=status, body=orjson.dumps(value))
