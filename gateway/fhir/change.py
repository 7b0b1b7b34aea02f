"""Creating, updating, patching and deleting records: prepared and decided, then carried out.

`prepare` finds out whose the record is, from what is sent and from what the app has now, and asks
the rules about both: who would move a record from one patient to another needs both. Nothing is
sent before every question was answered with yes and the intent is durable.

What somebody does not see he cannot change: hidden elements come from the prior version. The prior
version's ETag goes along as `If-Match`, so that nobody changes the record between the decision and
the change, whatever the client asked for. An app that gives no ETag, or does not heed `If-Match`,
has no such protection.

Of a record that was written somebody who may not read it hears only that it was: no content, no
ETag; of a new one its id, which is his own doing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Literal

from gateway.core.commands import Fetched
from gateway.core.enforcement import Question, Steps
from gateway.core.questions import patient_reference
from gateway.errors import BadRequestError, UnsupportedError, UpstreamError
from gateway.fhir import app as upstream
from gateway.fhir import patch
from gateway.fhir.app import App, Found
from gateway.fhir.definitions import is_resource_type
from gateway.fhir.hidden import restore_contained
from gateway.fhir.naming import name_ahead
from gateway.fhir.records import Record, Records, keys_at_hand
from gateway.fhir.release import restore_hidden
from gateway.fhir.request import Interaction
from gateway.fhir.resources import Json, codes_of, owner_paths
from policies.model import Action, Allowed, Denied

#: Marks that a release puts on a record, and that must not come back into it.
_NOTICE: Final = "NORDSCLCD"
_PART: Final = "SUBSETTED"
_REFUSALS: Final = frozenset({400, 404, 405, 409, 412, 422, 501})
#: What an app does, not what it keeps: a subscription sends records out, a search parameter looks
#: into what is hidden.
_OF_THE_APP: Final = frozenset(
    {"CapabilityStatement", "CompartmentDefinition", "GraphDefinition", "ImplementationGuide",
     "MessageDefinition", "OperationDefinition", "SearchParameter", "StructureDefinition",
     "StructureMap", "Subscription", "TerminologyCapabilities"}
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change that was allowed, not carried out yet.

    `record` is what will be written, opened; for a deletion what is there. `chosen`: the id of a
    new record was chosen here.
    """

    kind: Literal["create", "update", "delete"]
    record: Record
    questions: tuple[Question, ...]
    method: str
    path: str
    if_match: str | None = None
    if_none_match: str | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What may be said of a change. `content` only for those who may read it."""

    status: int
    content: Json | None = field(default=None, repr=False)
    location: str | None = field(default=None, repr=False)
    etag: str | None = None
    modified: str | None = None


class Changes:
    """See the module. One lives as long as one exchange."""

    def __init__(self, app: App, records: Records, new_id: Callable[[], str]) -> None:
        self._app = app
        self._records = records
        self._new_id = new_id

    def prepare(
        self, asked: Interaction, *, if_match: str | None, always_chosen: bool = False
    ) -> Steps[Change]:
        """Decide a change. Raises `RefusedError` or a `BadRequestError`; nothing is sent."""
        if asked.type in _OF_THE_APP or not is_resource_type(asked.type):
            raise UnsupportedError(
                "Records of FHIR R4 are changed here, not what the application itself does: let "
                "its operator do that behind the gateway."
            )
        match asked.name:
            case "create":
                return (yield from self._create(asked, always_chosen=always_chosen))
            case "update":
                return (yield from self._update(asked, if_match))
            case "patch":
                return (yield from self._patch(asked, if_match))
            case "delete":
                return (yield from self._delete(asked, if_match))
        raise UnsupportedError("This is no change of a record.")

    def validated(self, content: Json) -> Steps[Change]:
        """Decide whether the app may look at what might be written."""
        record = self._records.understood(content)
        new = record.type == "Patient" and record.id is None
        if new and self._records.plan.needs(content):
            record = self._records.understood({**content, "id": self._new_id()})
        questions = yield from self._demanded("execute", record, nobody=new)
        path = f"/{record.type}/$validate"
        return Change(kind="create", record=record, questions=questions, method="POST", path=path)

    # --- Preparing --------------------------------------------------------------------------------

    def _create(self, asked: Interaction, *, always_chosen: bool) -> Steps[Change]:
        content = {name: value for name, value in _content(asked).items() if name != "id"}
        plan = self._records.plan
        patient = asked.type == "Patient"
        if not patient or not (always_chosen or plan.needs(content)):
            record = self._records.understood(content)
            questions = yield from self._demanded("create", record, nobody=patient)
            path = f"/{asked.type}"
            return Change(
                kind="create", record=record, questions=questions, method="POST", path=path
            )
        # Sealing needs the person's name, so the id is chosen here. Nobody stands in any relation
        # to a patient who does not exist yet: the question is about no one's record.
        one = self._new_id()
        record = self._records.understood({**content, "id": one})
        questions = yield from self._demanded("create", record, nobody=True)
        named = tuple(replace(question, id=one, patient=one) for question in questions)
        return Change(
            kind="create",
            record=record,
            questions=named,
            method="PUT",
            path=f"/Patient/{one}",
            if_none_match="*",
            chosen=True,
        )

    def _update(self, asked: Interaction, if_match: str | None) -> Steps[Change]:
        content = _content(asked)
        if content.get("id") != asked.id:
            raise BadRequestError("The id in the body must be the one in the address.")
        assert asked.id is not None  # noqa: S101 - the grammar has no update without an id
        now = yield from self._app.read(asked.type, asked.id)
        if now is None:
            if if_match is not None:
                raise self._records.absent(asked.type)
            record = self._records.understood(content)
            first = yield from self._demanded("create", record)
            questions = yield from self._demanded("update", record)
            return Change(
                kind="update",
                record=record,
                questions=(*first, *questions),
                method="PUT",
                path=f"/{asked.type}/{asked.id}",
                # One that comes into being meanwhile was not decided about.
                if_none_match="*",
            )
        prior, allowed = yield from self._prior("update", now)
        return (yield from self._replaced("update", prior, allowed, now, content, if_match))

    def _patch(self, asked: Interaction, if_match: str | None) -> Steps[Change]:
        now = yield from self._existing(asked)
        prior, allowed = yield from self._prior("patch", now)
        reading = self._records.decide("read", prior)
        if isinstance(reading, Denied):
            # A patch speaks of what is there: who may not see it cannot.
            raise self._records.refusal("read", prior, reading)
        obligations = (*reading.obligations, *allowed.obligations)
        hidden = self._records.hidden(prior.type, obligations)
        shown = yield from self._records.enforcement.at_hand(
            partial(self._records.shown, prior, obligations)
        )
        content = patch.apply(asked.content, shown, hidden)
        return (yield from self._replaced("patch", prior, allowed, now, content, if_match))

    def _delete(self, asked: Interaction, if_match: str | None) -> Steps[Change]:
        now = yield from self._existing(asked)
        prior, _ = yield from self._prior("delete", now)
        return Change(
            kind="delete",
            record=prior,
            questions=self._records.questions("delete", prior),
            method="DELETE",
            path=f"/{asked.type}/{asked.id}",
            if_match=_condition(if_match, now),
        )

    def _existing(self, asked: Interaction) -> Steps[Found]:
        assert asked.id is not None  # noqa: S101 - the grammar has no change without an id
        now = yield from self._app.read(asked.type, asked.id)
        if now is None:
            raise self._records.absent(asked.type)
        return now

    def _prior(self, action: Action, now: Found) -> Steps[tuple[Record, Allowed]]:
        """The record as it is. Raises what its denial may tell."""
        [prior] = yield from self._records.opened([now.resource])
        decision = self._records.decide(action, prior)
        if isinstance(decision, Denied):
            raise self._records.refusal(action, prior, decision)
        return prior, decision

    def _replaced(
        self,
        action: Action,
        prior: Record,
        allowed: Allowed,
        now: Found,
        content: Json,
        if_match: str | None,
    ) -> Steps[Change]:
        """A new version in place of `prior`: what is hidden is taken over, and both are decided."""
        reading = self._records.decide("read", prior)
        seen = reading.obligations if isinstance(reading, Allowed) else ()
        obligations = (*seen, *allowed.obligations)
        hidden = self._records.hidden(prior.type, obligations)
        shown = yield from self._records.enforcement.at_hand(
            partial(self._records.shown, prior, obligations)
        )
        merged = restore_contained(without_marks(content, prior.content), shown, prior.content)
        if hidden:
            merged = restore_hidden(merged, prior.content, hidden)
        elif _is_part(merged, prior.content):
            raise UnsupportedError(
                "This is a part of the record (SUBSETTED): the rest would be lost. Read all of it, "
                "change it, and send it whole."
            )
        record = self._records.understood(merged)
        questions = yield from self._demanded(action, record)
        return Change(
            kind="update",
            record=record,
            questions=(*self._records.questions(action, prior), *questions),
            method="PUT",
            path=f"/{prior.type}/{prior.id}",
            if_match=_condition(if_match, now),
        )

    def _demanded(
        self, action: Action, record: Record, *, nobody: bool = False
    ) -> Steps[tuple[Question, ...]]:
        """Ask about what is sent. A denial is shown: it depends on nothing but what was sent."""
        if nobody:
            question = Question(
                action=action,
                type=record.type,
                authors=record.authors,
                labels=record.labels,
                codes=codes_of(record.content),
            )
            self._records.enforcement.demand(question)
            return (question,)
        if not record.known:
            raise BadRequestError(
                "It must be told whose record this is: one literal reference such as Patient/7, "
                "not contained, not conditional.",
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        _refuse_ambiguous(record)
        self._sealable(record)
        yield from self._records.enforcement.know(record.patients)
        questions = self._records.questions(action, record)
        for question in questions:
            self._records.enforcement.demand(question)
        return questions

    def _sealable(self, record: Record) -> None:
        if len(record.patients) != 1 and self._records.plan.needs(record.content):
            raise UnsupportedError(
                "This record has protected elements and concerns no patient, or several: under "
                "whose key they belong cannot be told. Write one record for each patient."
            )

    # --- Carrying out -----------------------------------------------------------------------------

    def protected(self, change: Change) -> Steps[Json | None]:
        """What the app gets. After the intent: a key may be made for a new person."""
        if change.kind == "delete":
            return None
        record, plan = change.record, self._records.plan
        enforcement = self._records.enforcement
        person = ""
        if plan.needs(record.content):
            person = patient_reference(record.patients[0])
            yield from enforcement.load_keys(persons=(person,))
        with keys_at_hand():
            return (
                yield from enforcement.at_hand(
                    lambda: plan.protect(record.content, person=person, sealer=enforcement.sealer)
                )
            )

    def carry_out(self, change: Change) -> Steps[Changed]:
        """Send it, after `begin`, and say what may be said of what came of it."""
        content = yield from self.protected(change)
        fetched = yield from self._app.change(
            change.method,
            change.path,
            content,
            if_match=change.if_match,
            if_none_match=change.if_none_match,
        )
        if change.chosen and fetched.head.status in _REFUSALS:
            raise UpstreamError(
                "The application does not let the gateway choose the id of a new patient, which "
                "is needed to seal. Leave Patient elements unsealed, or let it admit such ids."
            )
        upstream.check_status(fetched)
        if change.kind == "delete":
            return Changed(status=HTTPStatus.NO_CONTENT)
        return (yield from self._written(change, fetched))

    def _written(self, change: Change, fetched: Fetched) -> Steps[Changed]:
        created = change.kind == "create" or fetched.head.status == HTTPStatus.CREATED
        status = HTTPStatus.CREATED if created else HTTPStatus.OK
        named = upstream.place(fetched.head.headers.get("location"))
        one = change.record.id or (named[1] if named and named[0] == change.record.type else None)
        found: Found | None = None
        if fetched.body:
            content = upstream.parse(fetched)
            given = content.get("id")
            if (
                content["resourceType"] == change.record.type
                and upstream.is_id(given)
                and one in {None, given}
            ):
                found = upstream.found(content, fetched.head.headers)
                one = given
        location = f"{self._app.base}/{change.record.type}/{one}" if created and one else None
        if found is None:
            return Changed(status=status, location=location)
        [record] = yield from self._records.opened([found.resource])
        return (yield from self.told(status, location, record, found))

    def told(
        self, status: int, location: str | None, record: Record, found: Found
    ) -> Steps[Changed]:
        """What somebody hears of a record he wrote."""
        for question in self._records.questions("read", record):
            # The log names what was written even if its writer may not see it.
            self._records.enforcement.trail.touched(question)
        decision = self._records.decide("read", record)
        if isinstance(decision, Denied):
            self._records.withhold("read", record, decision)
            return Changed(status=status, location=location)
        yield from name_ahead(self._records, [(record, decision)])
        content = self._records.released("read", record, decision)
        version = (found.resource.get("meta") or {}).get("versionId")
        if location is not None and upstream.is_id(version):
            location = f"{location}/_history/{version}"
        return Changed(
            status=status,
            content=content,
            location=location,
            etag=found.etag,
            modified=found.modified,
        )


def without_marks(content: Json, prior: Json) -> Json:
    """`content` without the label that only a release put on it (`release.with_notice`)."""
    meta, before = content.get("meta"), prior.get("meta") or {}
    if not isinstance(meta, dict) or _NOTICE not in _codes(meta.get("security")):
        return content
    if _NOTICE in _codes(before.get("security")):
        return content
    kept = [one for one in meta["security"] if _NOTICE not in _codes([one])]
    new = {**meta, "security": kept}
    if not kept:
        del new["security"]
    return {**content, "meta": new}


def _refuse_ambiguous(record: Record) -> None:
    """Refuse `Subject` beside `subject`: an app that ignores case would file it elsewhere."""
    owners = {path.split(".")[1] for path in owner_paths(record.type)}
    folded = {name.casefold() for name in owners}
    if any(name not in owners and name.casefold() in folded for name in record.content):
        raise BadRequestError(
            "An element that says whose the record is is written in capitals and small letters "
            "otherwise than FHIR R4 does. Correct it.",
            status=HTTPStatus.UNPROCESSABLE_ENTITY,
        )


def _is_part(content: Json, prior: Json) -> bool:
    tags, before = ((one.get("meta") or {}).get("tag") for one in (content, prior))
    return _PART in _codes(tags) and _PART not in _codes(before)


def _codes(listed: Any) -> set[str]:
    if not isinstance(listed, list):
        return set()
    codes = [one.get("code") for one in listed if isinstance(one, dict)]
    return {code for code in codes if isinstance(code, str)}


def _condition(if_match: str | None, now: Found) -> str | None:
    """The version that must still be there. Raises with status 412 if it is not."""
    if if_match is None or now.etag is None:
        return if_match or now.etag
    wanted = {one.strip().removeprefix("W/") for one in if_match.split(",")}
    if "*" not in wanted and now.etag.removeprefix("W/") not in wanted:
        raise BadRequestError(
            "The record has changed since this version. Read it again.",
            status=HTTPStatus.PRECONDITION_FAILED,
        )
    return now.etag


def _content(asked: Interaction) -> Json:
    content = asked.content
    if not isinstance(content, dict) or content.get("resourceType") != asked.type:
        raise BadRequestError("The body must be a resource of the type in the address.")
    if asked.type in {"Bundle", "Parameters"}:
        raise UnsupportedError("Bundles and Parameters are not kept as records here.")
    return content


def refuse_conditions(headers: Collection[tuple[str, str]]) -> None:
    """Conditions that would be tested by the app against what nobody decided."""
    for name, _ in headers:
        if name == "if-none-exist":
            raise UnsupportedError(
                "Creating under a condition is not offered: search first, then create."
            )
        if name == "if-none-match":
            raise UnsupportedError("A change cannot depend on If-None-Match; use If-Match.")
