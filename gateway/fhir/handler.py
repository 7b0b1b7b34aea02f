"""What requests to a FHIR R4 app mean, carried out over `gateway.core.enforcement`.

Here stands which interaction goes which way; the ways are `records` (deciding one record),
`search`, `history`, `change` and `transaction`. Everything is read as a whole: there is no FHIR
request whose answer passes without being looked into.

Decided here, where FHIR leaves it open:

- Search, history and batch of the whole system are refused, and so is bulk `$export`: what they
  give cannot be decided before it leaves. `Patient/[id]/$everything` is a copy, record by record.
- A record that was deleted is answered like one that never was (404, not 410): whose it was can no
  longer be told.
- Conditions of reads (`If-None-Match`, `If-Modified-Since`) are answered here, after the decision.
- The notice of 42 CFR 2.32 stands on each record, on the Bundle, and in the header
  `redisclosure-notice`.
- `_summary=true` gives records without narrative: R4 allows to give more than the summary.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Final

from gateway.core.enforcement import Enforcement, Question, Reply, Steps
from gateway.core.handler import Inspected, Streamed
from gateway.core.messages import RequestHead
from gateway.errors import BadRequestError, UnsupportedError, UpstreamContentError
from gateway.fhir import app as upstream
from gateway.fhir.app import App, Found
from gateway.fhir.bundles import rebuilt
from gateway.fhir.change import Changed, Changes, refuse_conditions
from gateway.fhir.fields import FieldPlan, compile_fields
from gateway.fhir.history import Histories, version_decision
from gateway.fhir.links import Pager
from gateway.fhir.naming import name_ahead
from gateway.fhir.pages import Gathered, Pass, Place, packed, row_limit, unpacked
from gateway.fhir.query import Controls, controls, read_query
from gateway.fhir.records import Record, Records
from gateway.fhir.release import with_notice
from gateway.fhir.reply import joined, passing, reduced, reply, said, told_issue
from gateway.fhir.request import PAGE, Interaction, parse_head, parse_interaction
from gateway.fhir.resources import Json
from gateway.fhir.search import Searches
from gateway.fhir.templates import Templates
from gateway.fhir.transaction import Transactions
from gateway.settings import RouteSettings
from policies.model import Action, Allowed, Denied

_CHANGES: Final = frozenset({"create", "update", "patch", "delete"})
_OF_HISTORY: Final = frozenset({"_since", "_at", "_count", "_sort"})
_OF_EVERYTHING: Final = frozenset({"start", "end", "_since", "_type", "_count"})


def _uuid() -> str:
    return str(uuid.uuid4())


class FHIRHandler:
    """`gateway.core.handler.Handler` for one FHIR app. Keeps nothing of an exchange.

    `new_id` gives ids for new patients. Raises `GatewayConfigurationError` for fields that cannot
    be protected.
    """

    def __init__(
        self, settings: RouteSettings, *, pager: Pager, new_id: Callable[[], str] = _uuid
    ) -> None:
        self._plan: FieldPlan = compile_fields(settings.fields, service=settings.name)
        self._templates = Templates(self._plan)
        self._pager = pager
        self._new_id = new_id

    def plan(self, head: RequestHead) -> Inspected | Streamed:
        """See `Handler`. What an app can do (`/metadata`) may be public; the rules decide."""
        asked = parse_head(head)
        return Inspected(public=asked.name == "capabilities")

    def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
        """See `Handler`."""
        asked = parse_interaction(enforcement.head, body)
        records = Records(enforcement, self._plan, self._templates)
        return (yield from _Exchange(records, self._pager, self._new_id, enforcement).run(asked))


class _Exchange:
    """One exchange."""

    def __init__(
        self,
        records: Records,
        pager: Pager,
        new_id: Callable[[], str],
        enforcement: Enforcement,
    ) -> None:
        self._pager = pager
        self._enforcement = enforcement
        self._app = App(enforcement)
        self._records = records
        self._changes = Changes(self._app, self._records, new_id)

    def run(self, asked: Interaction) -> Steps[Reply]:
        if asked.name in _CHANGES:
            done = yield from self._change(asked)
        elif asked.name == "bundle":
            together = Transactions(self._app, self._records, self._changes, self._read_only)
            done = Changed(status=200, content=(yield from together.carry_out(asked.content)))
        else:
            done = yield from self._read_only(asked)
        return reply(self._enforcement.head, asked, done, self._records.notices)

    def _read_only(self, asked: Interaction) -> Steps[Changed]:
        ways = {
            "read": self._read,
            "vread": self._vread,
            "search": self._search,
            "history": self._history,
            "everything": self._everything,
            "page": self._page,
            "capabilities": self._capabilities,
            "validate": self._validate,
            "export": self._export,
        }
        return (yield from ways[asked.name](asked))

    def _begin(self, *questions: Question) -> Steps[None]:
        """Make the intent durable, or note what an exchange that has begun is about, too."""
        if self._enforcement.trail.begun is None:
            yield from self._enforcement.begin(questions)
        else:
            for question in questions:
                self._enforcement.trail.touched(question)

    # --- One record -------------------------------------------------------------------------------

    def _read(self, asked: Interaction) -> Steps[Changed]:
        found = yield from self._asked_for(asked)
        [record] = yield from self._records.opened([found.resource])
        decision = self._records.decide("read", record)
        return (yield from self._told(asked, found, record, decision))

    def _vread(self, asked: Interaction) -> Steps[Changed]:
        found = yield from self._asked_for(asked)
        now = yield from self._app.read(asked.type, asked.id or "")
        resources = [found.resource] if now is None else [found.resource, now.resource]
        record, *current = yield from self._records.opened(resources)
        decision = version_decision(
            self._records, "history", record, current[0] if current else None
        )
        return (yield from self._told(asked, found, record, decision))

    def _asked_for(self, asked: Interaction) -> Steps[Found]:
        """Ask the rules and the app for one record. Raises what its absence may tell."""
        if asked.id is None:
            raise BadRequestError("Expected the id of a record.")
        yield from self._records.gate(asked.action, asked.type, one=asked.id, named=asked.patients)
        yield from self._begin(Question(action=asked.action, type=asked.type, id=asked.id))
        found = yield from self._app.read(asked.type, asked.id, asked.version)
        if found is None:
            raise self._records.absent(asked.type)
        return found

    def _told(
        self, asked: Interaction, found: Found, record: Record, decision: Allowed | Denied
    ) -> Steps[Changed]:
        if isinstance(decision, Denied):
            raise self._records.refusal(asked.action, record, decision)
        yield from name_ahead(self._records, [(record, decision)])
        content = self._records.released(asked.action, record, decision)
        return Changed(
            status=HTTPStatus.OK,
            content=reduced(content, controls(asked)),
            etag=found.etag,
            modified=found.modified,
        )

    # --- Many records -----------------------------------------------------------------------------

    def _search(self, asked: Interaction) -> Steps[Changed]:
        how = controls(asked)
        action: Action = "count" if how.summary == "count" else "search"
        allowed = yield from self._records.gate(action, asked.type, named=asked.patients)
        obligations = [one for each in allowed for one in each.obligations]
        query = yield from self._enforcement.at_hand(
            lambda: read_query(asked, self._records, obligations)
        )
        questions = [Question(action=action, type=asked.type, patient=p) for p in asked.patients]
        yield from self._begin(*(questions or [Question(action=action, type=asked.type)]))
        searches = Searches(self._app, self._records)
        place = yield from searches.resolved(query)
        plan = Pass(
            kind="search",
            action=action,
            type=asked.type,
            tested=query.tested,
            rows=row_limit(allowed[0].obligations),
            named=asked.patients,
        )
        if action == "count":
            return (yield from self._counted(searches, place, plan))
        if place is None:
            return self._listed(asked, Gathered(counted=0), [], plan, how)
        want = min(how.count, plan.rows)
        # One more tells whether there are more.
        place = replace(place, query=joined(place.query, (("_count", str(want + 1)),)))
        found = yield from searches.gather(place, plan, want, total=how.total == "accurate")
        yield from name_ahead(self._records, found.going)
        return self._listed(asked, found, searches.release(found, plan, how), plan, how)

    def _counted(self, searches: Searches, place: Place | None, plan: Pass) -> Steps[Changed]:
        """A number about records: all of them are looked at, none is given."""
        number: int | None = 0
        if place is not None:
            many = self._enforcement.limits.looked_through
            place = replace(place, query=joined(place.query, (("_count", str(many)),)))
            # A number says nothing about how many records one answer may hold.
            found = yield from searches.gather(place, replace(plan, rows=many * 2), 0, total=True)
            number = found.counted
        if number is None:
            raise UnsupportedError(
                f"More than {self._enforcement.limits.looked_through} records would have to be "
                "looked at to count; narrow the search."
            )
        self._enforcement.count("total", number)
        content = {"resourceType": "Bundle", "type": "searchset", "total": number}
        return Changed(status=HTTPStatus.OK, content=content)

    def _history(self, asked: Interaction) -> Steps[Changed]:
        allowed = yield from self._records.gate(
            "history", asked.type, one=asked.id, named=asked.patients
        )
        yield from self._begin(Question(action="history", type=asked.type, id=asked.id))
        how = controls(asked)
        path = f"/{asked.type}" + (f"/{asked.id}" if asked.id else "") + "/_history"
        plan = Pass(
            kind="history",
            action="history",
            type=asked.type,
            rows=row_limit(allowed[0].obligations),
            named=asked.patients,
        )
        place = passing(path, asked.parameters, _OF_HISTORY, how)
        histories = Histories(self._app, self._records)
        try:
            found = yield from histories.gather(place, plan, min(how.count, plan.rows))
        except BadRequestError as error:
            if error.status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
                raise self._records.absent(asked.type) from error
            raise
        yield from name_ahead(self._records, found.going)
        entries = histories.release(found, plan, how)
        if not entries and asked.id is not None:
            # A record whose versions are all closed is like one that never was.
            raise self._records.absent(asked.type)
        found.counted = None
        return self._listed(asked, found, entries, plan, how)

    def _everything(self, asked: Interaction) -> Steps[Changed]:
        allowed = yield from self._records.gate(
            "export", "Patient", one=asked.id, named=asked.patients
        )
        question = Question(action="export", type="Patient", id=asked.id, patient=asked.id)
        yield from self._begin(question)
        how = controls(asked)
        plan = Pass(
            kind="everything",
            action="export",
            type="Patient",
            rows=row_limit(allowed[0].obligations),
            named=asked.patients,
        )
        place = passing(f"/Patient/{asked.id}/$everything", asked.parameters, _OF_EVERYTHING, how)
        searches = Searches(self._app, self._records)
        try:
            found = yield from searches.gather(place, plan, min(how.count, plan.rows))
        except BadRequestError as error:
            if error.status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
                raise self._records.absent("Patient") from error
            raise
        yield from name_ahead(self._records, found.going)
        return self._listed(asked, found, searches.release(found, plan, how), plan, how)

    def _page(self, asked: Interaction) -> Steps[Changed]:
        """Go on where a link leads: what comes is decided anew."""
        token = asked.parameter(PAGE) or ""
        if len(asked.parameters) != 1:
            raise BadRequestError("A link for a further page is used as it was given.")
        link = self._pager.open(
            token,
            principal=self._enforcement.identified.principal.id,
            route=self._enforcement.route.name,
            now=self._enforcement.now,
        )
        place, plan, how = unpacked(link)
        allowed = yield from self._records.gate(plan.action, plan.type, named=plan.named)
        rows = min(plan.rows, row_limit(allowed[0].obligations))
        plan = replace(plan, rows=rows)
        yield from self._begin(Question(action=plan.action, type=plan.type))
        kind = Histories if plan.kind == "history" else Searches
        searches = kind(self._app, self._records)
        found = yield from searches.gather(place, plan, how.count)
        found.counted = None
        yield from name_ahead(self._records, found.going)
        return self._listed(asked, found, searches.release(found, plan, how), plan, how)

    def _listed(
        self, asked: Interaction, found: Gathered, entries: list[Json], plan: Pass, how: Controls
    ) -> Changed:
        """The Bundle of an answer."""
        if not how.whole:
            entries = [
                {**entry, "resource": reduced(entry["resource"], how)}
                if "resource" in entry
                else entry
                for entry in entries
            ]
        links: list[Json] = []
        if asked.name in {"search", "history"} and not asked.form:
            own = self._enforcement.head
            if own.method in {"GET", "HEAD"} and asked.parameter(PAGE) is None:
                url = f"{self._app.base}{own.path}" + (f"?{own.query}" if own.query else "")
                links.append({"relation": "self", "url": url})
        if found.next is not None:
            # What was included counts, too: it is given as well.
            given = plan.given + len(entries)
            token = self._pager.seal(
                packed(found.next, replace(plan, given=given, rows=found.rows), how),
                principal=self._enforcement.identified.principal.id,
                route=self._enforcement.route.name,
                now=self._enforcement.now,
            )
            links.append({"relation": "next", "url": f"{self._app.base}/?{PAGE}={token}"})
        if found.cut:
            text = "There are more than may be given in one search; narrow it."
            entries = [*entries, said(text)]
        total = None if how.total == "none" else found.counted
        if total is not None:
            self._enforcement.count("total", total)
        kind = "history" if plan.kind == "history" else "searchset"
        content = rebuilt(
            {"resourceType": "Bundle", "type": kind}, entries, total=total, links=links
        )
        if self._records.notices:
            content = with_notice(content, self._records.notices)
        return Changed(status=HTTPStatus.OK, content=content)

    # --- Changes and the rest ---------------------------------------------------------------------

    def _change(self, asked: Interaction) -> Steps[Changed]:
        head = self._enforcement.head
        refuse_conditions(tuple(head.headers))
        change = yield from self._changes.prepare(asked, if_match=head.headers.get("if-match"))
        yield from self._enforcement.begin(change.questions)
        return (yield from self._changes.carry_out(change))

    def _capabilities(self, asked: Interaction) -> Steps[Changed]:
        yield from self._records.gate("read", asked.type)
        question = Question(action="read", type=asked.type)
        yield from self._begin(question)
        content = upstream.parse((yield from self._app.get("/metadata")))
        if content["resourceType"] != asked.type:
            raise UpstreamContentError("The application did not say what it can do.")
        [record] = yield from self._records.opened([content])
        decision = self._records.decide("read", record)
        if isinstance(decision, Denied):
            raise self._records.refusal("read", record, decision)
        yield from name_ahead(self._records, [(record, decision)])
        content = self._records.released("read", record, decision)
        implementation = content.get("implementation")
        if isinstance(implementation, dict):
            content = {**content, "implementation": {**implementation, "url": self._app.base}}
        return Changed(status=HTTPStatus.OK, content=content)

    def _validate(self, asked: Interaction) -> Steps[Changed]:
        """Have the app look at what might be written, protected as it would be."""
        sent = asked.content
        if not isinstance(sent, dict) or sent.get("resourceType") != asked.type:
            raise BadRequestError("The body must be a resource of the type in the address.")
        change = yield from self._changes.validated(sent)
        yield from self._enforcement.begin(change.questions)
        content = yield from self._changes.protected(change)
        fetched = yield from self._app.change("POST", f"/{asked.type}/$validate", content)
        answer = upstream.parse(fetched)
        issues = answer.get("issue")
        if answer["resourceType"] != "OperationOutcome" or not isinstance(issues, list):
            raise UpstreamContentError("The application did not answer with an OperationOutcome.")
        kept = [told_issue(one) for one in issues if isinstance(one, dict)]
        return Changed(
            status=HTTPStatus.OK, content={"resourceType": "OperationOutcome", "issue": kept}
        )

    def _export(self, asked: Interaction) -> Steps[Changed]:
        yield from self._records.gate("export", asked.type, one=asked.id, named=asked.patients)
        raise UnsupportedError(
            "Bulk export is not offered: its files cannot be decided record by record. Use "
            "Patient/[id]/$everything."
        )
