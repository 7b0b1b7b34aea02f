"""Batches and transactions: many interactions in one Bundle (FHIR R4 section 3.1.0.11).

A batch is what it says: interactions that have nothing to do with each other. Each is carried out
as if it had come alone, and one that is denied is answered in its place and never sent. Every
change is decided before the first is sent, so that the intent names all.

A transaction is all or nothing: one change that is denied refuses the whole, before anything is
sent; the rest is the app's to keep together. Reads of a transaction come after its changes, as FHIR
orders them, and are answered in their places. Patients created in it get their ids here, so that
`urn:uuid:` references to them say whose the other records are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from gateway.core import answers
from gateway.core.enforcement import RefusedError, Steps
from gateway.errors import (
    BadRequestError,
    GatewayError,
    UnavailableError,
    UnsupportedError,
    UpstreamContentError,
)
from gateway.fhir import app as upstream
from gateway.fhir import bundles
from gateway.fhir.app import App
from gateway.fhir.change import Change, Changed, Changes
from gateway.fhir.records import Records
from gateway.fhir.request import Interaction, located, parse_query
from gateway.fhir.resources import Json

MAX_ENTRIES: Final = 500
_CHANGES: Final = frozenset({"create", "update", "delete"})
_READS: Final = frozenset({"read", "vread", "search", "history"})
_CONDITIONS: Final = frozenset({"ifNoneExist", "ifNoneMatch", "ifModifiedSince"})

type Carry = Callable[[Interaction], Steps[Changed]]


@dataclass(slots=True, kw_only=True)
class _Part:
    """One entry on its way. `answer` is set once it is known."""

    asked: Interaction | None = None
    full_url: str | None = field(default=None, repr=False)
    if_match: str | None = None
    change: Change | None = None
    answer: Json | None = field(default=None, repr=False)


class Transactions:
    """See the module. `carry` carries out one interaction that only reads."""

    def __init__(self, app: App, records: Records, changes: Changes, carry: Carry) -> None:
        self._app = app
        self._records = records
        self._changes = changes
        self._carry = carry

    def carry_out(self, bundle: Json) -> Steps[Json]:
        """The Bundle that answers. Raises `RefusedError` for a transaction that is denied."""
        kind = bundle.get("type")
        if bundle.get("resourceType") != "Bundle" or kind not in {"batch", "transaction"}:
            raise BadRequestError("What is posted here must be a Bundle: batch or transaction.")
        listed = bundle.get("entry", [])
        if not isinstance(listed, list) or len(listed) > MAX_ENTRIES:
            raise BadRequestError(f"A Bundle has a list of at most {MAX_ENTRIES} entries.")
        if kind == "batch":
            parts = yield from self._batch(listed)
        else:
            parts = yield from self._transaction(listed)
        return {
            "resourceType": "Bundle",
            "type": f"{kind}-response",
            "entry": [part.answer for part in parts],
        }

    # --- Batch ------------------------------------------------------------------------------------

    def _batch(self, listed: list[Any]) -> Steps[list[_Part]]:
        parts: list[_Part] = []
        for entry in listed:
            part = _Part()
            parts.append(part)
            try:
                part = parts[-1] = self._read_entry(entry)
                yield from self._prepare(part)
            except (RefusedError, GatewayError) as error:
                part.answer = self._in_place(error)
        _refuse_twice([part.change for part in parts if part.change and not part.answer])
        yield from self._begin(parts)
        for part in parts:
            if part.answer is None:
                yield from self._run(part)
        return parts

    def _run(self, part: _Part) -> Steps[None]:
        try:
            if part.change is not None:
                done = yield from self._changes.carry_out(part.change)
            elif part.asked is not None:
                done = yield from self._carry(part.asked)
            else:
                raise UnsupportedError("There is nothing to do.")
            part.answer = answered(done)
        except (RefusedError, GatewayError) as error:
            part.answer = self._in_place(error)

    def _in_place(self, error: RefusedError | GatewayError) -> Json:
        """The answer to one entry. What stops everything is raised again."""
        match error:
            case UnavailableError():
                raise error
            case RefusedError(denied=denied, hide=hide):
                self._records.enforcement.count("withheld")
                refusal = answers.for_denial(denied, hide=hide)
                return refused(refusal.status, f"{refusal.detail} {refusal.remedy_text}".strip())
            case BadRequestError(status=status):
                return refused(status, str(error))
        status = getattr(error, "status", HTTPStatus.BAD_GATEWAY)
        return refused(status, "The application behind did not answer as it should.")

    # --- Transaction ------------------------------------------------------------------------------

    def _transaction(self, listed: list[Any]) -> Steps[list[_Part]]:
        parts = [self._read_entry(entry) for entry in listed]
        new: dict[str, str] = {}
        for part in parts:
            if part.asked and part.asked.name == "create" and part.asked.type == "Patient":
                yield from self._prepare(part, always_chosen=True)
                if part.full_url and part.change:
                    new[part.full_url] = f"Patient/{part.change.record.id}"
        for part in parts:
            if part.change is None and part.asked is not None:
                content = _resolved(part.asked.content, new)
                part.asked = replace(part.asked, content=content)
                yield from self._prepare(part)
        changes = [part.change for part in parts if part.change]
        _refuse_twice(changes)
        yield from self._begin(parts)
        if changes:
            yield from self._send([part for part in parts if part.change])
        for part in parts:
            if part.answer is None:
                yield from self._run(part)
        return parts

    def _send(self, parts: list[_Part]) -> Steps[None]:
        entries: list[Json] = []
        for part in parts:
            if part.change is not None:
                content = yield from self._changes.protected(part.change)
                entries.append(_entry(part.change, content, part.full_url))
        bundle: Json = {"resourceType": "Bundle", "type": "transaction", "entry": entries}
        base = "" if self._records.enforcement.route.base else "/"
        fetched = yield from self._app.change("POST", base, bundle)
        answer = upstream.parse(fetched)
        told = bundles.entries(answer)
        if answer.get("type") != "transaction-response" or len(told) != len(parts):
            raise UpstreamContentError("The application did not answer a transaction as such.")
        for part, entry in zip(parts, told, strict=True):
            if part.change is not None:
                part.answer = answered((yield from self._told(part.change, entry)))

    def _told(self, change: Change, entry: Json) -> Steps[Changed]:
        """What may be said of one change of a transaction."""
        response = entry.get("response") or {}
        if not str(response.get("status", "")).startswith("2"):
            raise UpstreamContentError(
                "The application does not say of each part of the transaction that it is done."
            )
        if change.kind == "delete":
            return Changed(status=HTTPStatus.NO_CONTENT)
        created = change.kind == "create" or str(response.get("status", "")).startswith("201")
        status = HTTPStatus.CREATED if created else HTTPStatus.OK
        named = upstream.place(response.get("location"))
        one = change.record.id or (named[1] if named and named[0] == change.record.type else None)
        location = f"{self._app.base}/{change.record.type}/{one}" if created and one else None
        content = bundles.entry_resource(entry)
        if content is None or content["resourceType"] != change.record.type:
            return Changed(status=status, location=location)
        [record] = yield from self._records.opened([content])
        etag = response.get("etag")
        found = upstream.Found(resource=content, etag=etag if isinstance(etag, str) else None)
        return (yield from self._changes.told(status, location, record, found))

    # --- Both -------------------------------------------------------------------------------------

    def _begin(self, parts: list[_Part]) -> Steps[None]:
        questions = [
            question
            for part in parts
            if part.change is not None and part.answer is None
            for question in part.change.questions
        ]
        counts = {"entries": len(parts)}
        yield from self._records.enforcement.begin(questions, counts=counts)

    def _prepare(self, part: _Part, *, always_chosen: bool = False) -> Steps[None]:
        if part.asked is not None and part.asked.name in _CHANGES:
            part.change = yield from self._changes.prepare(
                part.asked, if_match=part.if_match, always_chosen=always_chosen
            )

    def _read_entry(self, entry: Any) -> _Part:
        request = entry.get("request") if isinstance(entry, dict) else None
        if not isinstance(request, dict) or not all(
            isinstance(request.get(name), str) for name in ("method", "url")
        ):
            raise BadRequestError("Each entry needs a request with method and url.")
        if not _CONDITIONS.isdisjoint(request):
            raise UnsupportedError("Entries cannot depend on conditions other than ifMatch.")
        url = request["url"].removeprefix(f"{self._app.base}/")
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or parts.fragment:
            raise BadRequestError("The url of an entry is relative to the base: Observation/1.")
        method = request["method"]
        asked = located(method, f"/{parts.path.removeprefix('/')}", parse_query(parts.query))
        if asked.name not in _CHANGES | _READS:
            raise UnsupportedError("Entries read, search, create, update or delete; no others.")
        content = entry.get("resource")
        _refuse_conditional(content)
        if_match = request.get("ifMatch")
        full_url = entry.get("fullUrl")
        return _Part(
            asked=replace(asked, content=content),
            full_url=full_url if isinstance(full_url, str) else None,
            if_match=if_match if isinstance(if_match, str) else None,
        )


def answered(done: Changed) -> Json:
    """One entry of the answer."""
    response: Json = {"status": f"{int(done.status)} {HTTPStatus(done.status).phrase}"}
    for name, value in (("location", done.location), ("etag", done.etag)):
        if value is not None:
            response[name] = value
    entry: Json = {} if done.content is None else {"resource": done.content}
    return {**entry, "response": response}


def refused(status: int, text: str) -> Json:
    """An entry that was not carried out."""
    return {"response": {"status": str(int(status)), "outcome": outcome("processing", text)}}


def outcome(code: str, text: str, severity: str = "error") -> Json:
    """An OperationOutcome in the gateway's own words."""
    issue = {"severity": severity, "code": code, "diagnostics": text}
    return {"resourceType": "OperationOutcome", "issue": [issue]}


def _entry(change: Change, content: Json | None, full_url: str | None) -> Json:
    request: Json = {"method": change.method, "url": change.path.removeprefix("/")}
    if change.if_match is not None:
        request["ifMatch"] = change.if_match
    entry: Json = {"request": request}
    if content is not None:
        entry["resource"] = content
    if full_url is not None and full_url.startswith("urn:"):
        entry["fullUrl"] = full_url
    return entry


def _refuse_twice(changes: list[Change]) -> None:
    """One Bundle changes a record once: what was decided must be what is changed."""
    paths = [change.path for change in changes if change.method != "POST"]
    if len(paths) != len(set(paths)):
        raise BadRequestError("A Bundle can change each record once.")


def _refuse_conditional(content: Any) -> None:
    """Refuse references that the app would resolve by a search that nobody decides."""
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            reference = value.get("reference")
            if isinstance(reference, str) and "?" in reference:
                raise UnsupportedError("Conditional references are not offered: search first.")
            stack += value.values()


def _resolved(content: Any, new: dict[str, str]) -> Any:
    """Content with references to patients of this Bundle by their ids."""
    if not new:
        return content
    if isinstance(content, list):
        return [_resolved(one, new) for one in content]
    if isinstance(content, dict):
        return {
            name: new.get(value, value)
            if name == "reference" and isinstance(value, str)
            else _resolved(value, new)
            for name, value in content.items()
        }
    return content
