"""The clinic over HTTP: `/fhir` is the FHIR server, `/api/moods` the diary, the rest is pages.

An RSGI application for Granian, one process, calls of SQLite included: each takes well under a
millisecond. Pages are the same for everybody; their script reads FHIR and the diary, as that of
any such app does, so what a reader may not have is simply not there.
"""

from __future__ import annotations

import mimetypes
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

import orjson

from examples.clinic.fhir import answer
from examples.clinic.messages import Ask, Reply
from examples.clinic.store import Store

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_NOTE = 65_536
_STATIC = {path.name: path.read_bytes() for path in Path(__file__).with_name("static").iterdir()}
_PLAIN = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


class _Scope(Protocol):
    """What this app reads of Granian's scope."""

    proto: str
    method: str
    path: str
    query_string: str
    scheme: str
    headers: Any


class Clinic:
    """The application. `store` belongs to it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def __rsgi__(self, scope: _Scope, protocol: Any) -> None:
        """Answer one request."""
        if scope.proto != "http":
            protocol.close(403)
            return
        body = bytearray()
        if scope.method in {"POST", "PUT", "PATCH"}:
            async for piece in protocol:
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    break
        reply = self.reply(scope, bytes(body))
        headers = [*reply.headers.items(), ("content-length", str(len(reply.body)))]
        if scope.method == "HEAD" or not reply.body:
            protocol.response_empty(
                reply.status, headers if scope.method == "HEAD" else headers[:-1]
            )
        else:
            protocol.response_bytes(reply.status, headers, reply.body)

    def reply(self, scope: _Scope, body: bytes) -> Reply:  # noqa: PLR0911 - a table of paths
        """The answer to a request whose body has arrived."""
        if len(body) > MAX_BODY_BYTES:
            return _problem(413, "the body is too large")
        match scope.path.split("/")[1:]:
            case ["fhir", *rest]:
                return self._fhir(scope, "/".join(rest), body)
            case ["api", "moods", patient, *rest]:
                return self._moods(scope, patient, rest, body)
            case [""]:
                return _file(scope, "patients.html")
            case ["patients", _]:
                return _file(scope, "patient.html")
            case ["static", name]:
                return _file(scope, name)
        return _problem(404, "there is no such page")

    def _fhir(self, scope: _Scope, path: str, body: bytes) -> Reply:
        headers = {name.lower(): value for name, value in scope.headers.items()}
        base = f"{scope.scheme}://{headers.get('host', 'localhost')}/fhir"
        reply = answer(
            self.store,
            Ask(
                method=scope.method,
                path=path,
                query=scope.query_string,
                headers=headers,
                body=body,
                base=base,
            ),
        )
        kind = {"content-type": "application/fhir+json; charset=utf-8"} if reply.body else {}
        return Reply(status=reply.status, headers={**kind, **reply.headers}, body=reply.body)

    # --- The mood diary ---------------------------------------------------------------------------

    def _moods(self, scope: _Scope, patient: str, rest: list[str], body: bytes) -> Reply:
        match scope.method, rest:
            case (("GET" | "HEAD"), []):
                since = parse_qs(scope.query_string).get("from", [""])[0]
                rows = self._entries("patient=? AND at>=? ORDER BY at, id", patient, since)
                return _json(200, {"patient": patient, "total": len(rows), "entries": rows})
            case (("GET" | "HEAD"), [name]):
                rows = self._entries("patient=? AND id=?", patient, name)
                return _json(200, rows[0]) if rows else _problem(404, "there is no such entry")
            case "POST", []:
                return self._write(patient, body)
            case "DELETE", [name]:
                self.store.database.execute(
                    "DELETE FROM mood WHERE patient=? AND id=?", (patient, name)
                )
                return Reply(status=204)
        return _problem(405, "the diary is read with GET and written with POST")

    def _entries(self, condition: str, *args: str) -> list[dict[str, Any]]:
        rows = self.store.database.execute(
            f"SELECT patient, id, at, mood, note FROM mood WHERE {condition}",  # noqa: S608 - written above
            args,
        )
        names = ("patient", "id", "at", "mood", "note")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _write(self, patient: str, body: bytes) -> Reply:
        try:
            given = orjson.loads(body)
            mood, note = given["mood"], given.get("note", "")
        except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
            return _problem(400, "an entry is a JSON object with mood and note")
        if not (type(mood) is int and 1 <= mood <= 10):  # noqa: PLR2004 - the scale of the diary
            return _problem(400, "mood has to be a whole number from 1 to 10")
        if not (isinstance(note, str) and len(note) <= MAX_NOTE):
            return _problem(400, f"note has to be text of at most {MAX_NOTE} characters")
        at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        entry = {"patient": patient, "id": uuid.uuid4().hex, "at": at, "mood": mood, "note": note}
        self.store.database.execute(
            "INSERT INTO mood VALUES (:patient, :id, :at, :mood, :note)", entry
        )
        place = f"/api/moods/{patient}/{entry['id']}"
        reply = _json(201, entry)
        return Reply(status=201, headers={**reply.headers, "location": place}, body=reply.body)


def _file(scope: _Scope, name: str) -> Reply:
    if scope.method not in {"GET", "HEAD"}:
        return _problem(405, "a page can only be read")
    if name not in _STATIC:
        return _problem(404, "there is no such page")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    charset = "; charset=utf-8" if kind.startswith("text/") else ""
    return Reply(status=200, headers={"content-type": kind + charset, **_PLAIN}, body=_STATIC[name])


def _json(status: int, value: Any) -> Reply:
    return Reply(
        status=status, headers={"content-type": "application/json"}, body=orjson.dumps(value)
    )


def _problem(status: int, text: str) -> Reply:
    return _json(status, {"error": text})
