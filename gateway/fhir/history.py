"""Histories: a version is decided like a record, and so is what the record is today.

An old version may have been filed under the wrong patient, or before the record was labelled: it is
released only if the record as it is now is about the same patients and is open to the same person.
If the record was deleted, the version decides alone.

That something was deleted is told only beside another version of the same id which is released:
nobody can say whose a version without content was.
"""

from __future__ import annotations

from collections import defaultdict
from http import HTTPStatus

import orjson

from gateway.core.enforcement import Steps
from gateway.fhir.app import App, place
from gateway.fhir.bundles import entry_resource
from gateway.fhir.pages import Match, Pass, Place
from gateway.fhir.query import encoded
from gateway.fhir.records import Record, Records
from gateway.fhir.resources import Json
from gateway.fhir.search import Searches
from policies.model import Action, Allowed, Decision, Denied, Remedy
from policies.obligations import join

type Key = tuple[str, str | None]

_MOVED = Denied(
    reason="This version is about somebody else than the record is now.",
    rules=(),
    remedy=Remedy(kind="records_office"),
)


def version_decision(
    records: Records, action: Action, version: Record, current: Record | None
) -> Decision:
    """Decide a version by its own content and by what the record is now (None: deleted)."""
    decision = records.decide(action, version)
    if isinstance(decision, Denied) or current is None:
        return decision
    if current.patients != version.patients:
        return _MOVED
    now = records.decide(action, current)
    if isinstance(now, Denied):
        return now
    return Allowed(
        obligations=join((*decision.obligations, *now.obligations)),
        rules=tuple(sorted({*decision.rules, *now.rules})),
    )


class Histories(Searches):
    """Goes through the app's pages of versions."""

    def __init__(self, app: App, records: Records) -> None:
        super().__init__(app, records)
        self._current: dict[Key, Record | None] = {}
        self._deleted: defaultdict[Key, list[Json]] = defaultdict(list)
        #: Deletions to be told before a version, by the identity of its entry.
        self._told: dict[int, list[Json]] = {}

    def _usable(self, entries: list[Json]) -> list[Json]:
        for entry in entries:
            content = entry_resource(entry)
            if content is not None:
                key = (content["resourceType"], content.get("id"))
                self._told[id(entry)] = self._deleted.pop(key, [])
            elif (gone := _deleted_key(entry)) is not None:
                self._deleted[gone].append(entry)
        return super()._usable(entries)

    def _before(self, records: list[Record]) -> Steps[None]:
        """Learn what the records are now: one question to the app for each type."""
        wanted: defaultdict[str, list[str]] = defaultdict(list)
        for record in records:
            key = (record.type, record.id)
            if record.id is not None and key not in self._current:
                self._current[key] = None
                wanted[record.type].append(record.id)
        for kind, ids in wanted.items():
            yield from self._learn(kind, ids)

    def _learn(self, kind: str, ids: list[str]) -> Steps[None]:
        if len(ids) == 1:
            found = yield from self._app.read(kind, ids[0])
            if found is not None:
                [record] = yield from self._records.opened([found.resource])
                self._current[kind, ids[0]] = record
            return
        query = encoded((("_id", ",".join(sorted(ids))), ("_count", str(len(ids)))))
        here: Place | None = Place(path=f"/{kind}", query=query)
        missing, pages = set(ids), 0
        # An app has no reason for more pages than records.
        while here is not None and missing and pages < len(ids):
            _, records, here = yield from Searches(self._app, self._records).page(here)
            pages += 1
            for record in records:
                if record.type == kind and record.id in missing:
                    missing.discard(record.id)
                    self._current[kind, record.id] = record
        # What a search does not find need not be gone.
        for one in sorted(missing):
            yield from self._learn(kind, [one])

    def _decision(self, record: Record, plan: Pass) -> Decision:
        current = self._current.get((record.type, record.id))
        return version_decision(self._records, plan.action, record, current)

    def _listed(self, match: Match, content: Json | orjson.Fragment) -> list[Json]:
        deleted = [
            self._version(match, one, status=HTTPStatus.NO_CONTENT)
            for one in self._told.get(id(match.entry), [])
        ]
        return [*deleted, {**self._version(match, match.entry), "resource": content}]

    def _version(self, match: Match, entry: Json, *, status: int | None = None) -> Json:
        kind, one = match.record.type, match.record.id
        request, response = entry.get("request") or {}, entry.get("response") or {}
        method = request.get("method")
        if status is not None:
            method = "DELETE"
        told = {
            name: response[name]
            for name in ("status", "etag", "lastModified")
            if isinstance(response.get(name), str)
        }
        return {
            "fullUrl": f"{self._app.base}/{kind}/{one}",
            "request": {
                "method": method if method in {"POST", "PUT", "PATCH", "DELETE"} else "PUT",
                "url": f"{kind}/{one}",
            },
            "response": {"status": str(status or HTTPStatus.OK.value), **told},
        }


def _deleted_key(entry: Json) -> Key | None:
    for text in ((entry.get("request") or {}).get("url"), entry.get("fullUrl")):
        named = place(text)
        if named is not None:
            return named[0], named[1]
    return None
