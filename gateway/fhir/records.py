"""Records of patients within one exchange: opened, understood, decided, released or hidden.

A record is what stands in a resource once its sealed elements are open. Its own content says whose
it is and how it is labelled; a record of a patient type whose patient cannot be told is never
released and never written.

What a denial tells (policies/DESIGN.md, "Known limits"). A denial that would come to anybody for a
record that does not exist either is shown as it is: it is decided before the app is asked (`gate`).
A denial that depends on a record tells that it exists, so it is answered like nothing at all, but
for two cases:

- `step_up`: the record is open to this person as soon as the second factor is shown again. Shown if
  the patient is open to him, or would be once the factor is shown.
- the same denial, for the same reason, would come for a record of this type and this patient with
  nothing special in it (a consent about this type, a purpose, a scope), and the patient's own
  record is open to him. What it tells is about the patient, whom he treats, not about the content.

Denials by labels (psychotherapy notes; 42 CFR 2.13(c)(2): no answer may reveal that somebody is
treated) are therefore always hidden. So is "not on the care team" for a record asked for by its id:
break-glass is offered where the request names the patient.

What this cannot hide: that an id is taken from somebody who tries to create a record under it
(`PUT`: 404 instead of 201); what an app tells by refusing a change, for example because a closed
record refers to the one to be deleted; and what stands in an open record about a closed one, such
as a reference to it. A Binary carries no labels, so nobody gets one through the gateway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Final

import orjson

from gateway.core.enforcement import Enforcement, Question, RefusedError, Steps
from gateway.core.questions import patient_reference
from gateway.errors import (
    BadRequestError,
    GatewayError,
    UnavailableError,
    UnsupportedError,
    UpstreamContentError,
)
from gateway.fhir.fields import FieldPlan
from gateway.fhir.release import carry_out, hidden_paths, with_notice
from gateway.fhir.resources import (
    Json,
    authors_of,
    codes_of,
    is_patient_type,
    ownership,
    patients_of,
)
from gateway.fhir.templates import Opened, Template, Templates, UnkeptError
from keys.errors import KeysError
from policies.errors import UnlabelledContentError
from policies.labels import Labels
from policies.model import Action, Allowed, Decision, Denied, Remedy
from policies.obligations import Obligation, RedisclosureNotice, join

#: Of somebody's own patients only so many are tried before an answer has been seen.
MAX_TRIED: Final = 16
MAX_NAMED: Final = 256
NOTHING: Final = "There is nothing here, or nothing that is open to you."

_UNKNOWN_PATIENT: Final = Denied(
    reason="It cannot be told whose record this is.", rules=(), remedy=Remedy(kind="operator")
)
_ABSENT: Final = Denied(reason=NOTHING, rules=(), remedy=Remedy(kind="administrator"))
_NO_FACTOR: Final = Denied(
    reason="This needs a second factor, and none was shown.",
    rules=(),
    remedy=Remedy(kind="step_up"),
)
#: Remedies that are about the patient or the request, not about what is in a record.
_ABOUT_PATIENT: Final = frozenset({"consent", "purpose", "scope", "break_glass"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One resource, opened. `known`: not of a patient type, or it can be told whose it is.

    `broken`: why it could not be opened or labelled; then its content is as the app gave it.
    """

    source: Plain | Opened = field(repr=False)
    type: str
    id: str | None = field(repr=False)
    patients: tuple[str, ...] = field(repr=False)
    known: bool
    labels: Labels
    authors: frozenset[str] = field(repr=False)
    broken: UpstreamContentError | None = field(default=None, repr=False)

    @property
    def content(self) -> Json:
        """The resource as JSON objects. Not to be changed."""
        return self.source.content

    def without_content(self) -> Record:
        """What can be said of it without its content."""
        return self.with_source(_NO_CONTENT)

    def with_source(self, source: Plain | Opened) -> Record:
        """The same record with its content from elsewhere (made often, so not by `replace`)."""
        return Record(
            source=source,
            type=self.type,
            id=self.id,
            patients=self.patients,
            known=self.known,
            labels=self.labels,
            authors=self.authors,
            broken=self.broken,
        )


@dataclass(frozen=True, slots=True)
class Plain:
    """Content that is there as JSON objects."""

    content: Json = field(repr=False)


_NO_CONTENT: Final = Plain({})


class Records:
    """See the module. One lives as long as one exchange; `templates` as long as its route."""

    def __init__(self, enforcement: Enforcement, plan: FieldPlan, templates: Templates) -> None:
        self.enforcement = enforcement
        self.plan = plan
        self.notices: set[str] = set()
        self._templates = templates
        self._kind = enforcement.route.settings.kind
        self._protects = bool(enforcement.route.settings.fields)

    # --- From the app -----------------------------------------------------------------------------

    def opened(self, resources: Sequence[Json]) -> Steps[list[Record]]:
        """Open and understand what the app gave, and learn the facts about all its patients.

        What cannot be opened or labelled is `broken`: `decide` raises for those who could read it,
        so that a record closed to somebody does not stop what is open to him.
        """
        made_with = self.enforcement.labeller, self.enforcement.sealer.generation
        self._templates.bind(*made_with)
        known = [self._templates.find(one, self.enforcement.now) for one in resources]
        texts = [
            template.texts if template else self._sealed_texts(one)
            for one, (_, template) in zip(resources, known, strict=True)
        ]
        yield from self.enforcement.load_keys(texts=chain.from_iterable(texts))
        with keys_at_hand():
            records = [
                _by_template(template) or self._opened(one, sealed=bool(sealed))
                for one, (_, template), sealed in zip(resources, known, texts, strict=True)
            ]
        if self._templates.is_bound(*made_with):
            for one, (raw, template), record in zip(resources, known, records, strict=True):
                if template is None:
                    self._offer(raw, one, record)
        yield from self.enforcement.know({p for record in records for p in record.patients})
        return records

    def _sealed_texts(self, resource: Json) -> list[str]:
        return self.plan.sealed_texts(resource) if self._protects else []

    def _offer(self, raw: bytes, resource: Json, record: Record) -> None:
        enforcement = self.enforcement
        self._templates.offer(raw, resource, record, enforcement.sealer, enforcement.now)

    def _opened(self, resource: Json, *, sealed: bool) -> Record:
        try:
            return self._readable(resource, sealed=sealed)
        except (UpstreamContentError, BadRequestError) as error:
            patients, open_ = ownership(resource)
            kind, one = str(resource["resourceType"]), resource.get("id")
            return Record(
                source=Plain(resource),
                type=kind,
                id=one if isinstance(one, str) else None,
                patients=tuple(sorted(patients)),
                known=not open_ and (bool(patients) or not is_patient_type(kind)),
                labels=Labels(),
                authors=authors_of(resource),
                broken=UpstreamContentError(str(error)),
            )

    def _readable(self, resource: Json, *, sealed: bool) -> Record:
        if not self._protects:
            return self.understood(resource)
        patients = patients_of(resource)
        if sealed and len(patients) != 1:
            # Nobody can tell under whose key it belongs: it stays closed.
            return replace(self.understood(resource), known=False)
        person = patient_reference(*patients) if len(patients) == 1 else ""
        content = self.plan.unprotect(resource, person=person, sealer=self.enforcement.sealer)
        # Elements that say whose a record is are never sealed: the patients are the same.
        return self.understood(content, patients)

    def understood(self, content: Json, patients: frozenset[str] | None = None) -> Record:
        """What opened content says of itself. Raises `BadRequestError` if it cannot be labelled."""
        kind = str(content["resourceType"])
        try:
            labels = self.enforcement.labeller.label(content, kind=self._kind).whole
        except UnlabelledContentError as error:
            raise BadRequestError(
                "The content is too large or nested too deeply to be looked into.",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            ) from error
        owners, open_ = ownership(content)
        patients = owners if patients is None else patients
        known = not open_ and (bool(patients) or not is_patient_type(kind))
        # What is in a Binary cannot be labelled: it could be the text of a closed note.
        known = known and kind != "Binary"
        one = content.get("id")
        return Record(
            source=Plain(content),
            type=kind,
            id=one if isinstance(one, str) else None,
            patients=tuple(sorted(patients)),
            known=known,
            labels=labels,
            authors=authors_of(content),
        )

    # --- Questions --------------------------------------------------------------------------------

    def questions(self, action: Action, record: Record) -> tuple[Question, ...]:
        """One for each patient concerned: all of them must be answered with yes."""
        return tuple(
            Question(
                action=action,
                type=record.type,
                id=record.id,
                patient=patient,
                authors=record.authors,
                labels=record.labels,
                # Only consents look at codes, and most patients have none.
                codes=codes_of(record.content) if self.enforcement.consented(patient) else None,
            )
            for patient in record.patients or (None,)
        )

    def decide(self, action: Action, record: Record) -> Decision:
        """Decide one record. Pure: its patients are known already.

        Raises `UpstreamContentError` for a broken one that nothing else closes.
        """
        if not record.known:
            return _UNKNOWN_PATIENT
        decision = self.together(self.questions(action, record))
        if record.broken is not None and isinstance(decision, Allowed):
            raise record.broken
        return decision

    def together(self, questions: Iterable[Question]) -> Decision:
        """Yes if every question is answered with yes; obligations add up."""
        allowed: list[Allowed] = []
        for question in questions:
            decision = self.enforcement.ask(question)
            if isinstance(decision, Denied):
                return decision
            allowed.append(decision)
        if len(allowed) == 1:
            return allowed[0]
        return Allowed(
            obligations=join(one for each in allowed for one in each.obligations),
            rules=tuple(sorted({rule for each in allowed for rule in each.rules})),
        )

    def gate(
        self, action: Action, kind: str, *, one: str | None = None, named: Collection[str] = ()
    ) -> Steps[tuple[Allowed, ...]]:
        """Ask before the app is asked; what is allowed in all ways in which it may turn out.

        With `named` patients, for them. Otherwise for a record of nobody in particular, and if that
        is denied for the persons that this principal has to do with. Raises `RefusedError`: shown,
        for it does not depend on any record.
        """
        enforcement = self.enforcement
        if len(named) > MAX_NAMED:
            raise UnsupportedError(f"A request names at most {MAX_NAMED} patients; ask in parts.")
        tried: list[str | None] = [*sorted(named)] if named else [None]
        yield from enforcement.know(named)
        found = self._gated(action, kind, one, tried)
        if not found and not named:
            own = self._own_patients()
            yield from enforcement.know(own)
            found = self._gated(action, kind, one, own)
        if not found:
            enforcement.demand(Question(action=action, type=kind, id=one, patient=tried[0]))
        return tuple(found)

    def _gated(
        self, action: Action, kind: str, one: str | None, tried: Sequence[str | None]
    ) -> list[Allowed]:
        found: list[Allowed] = []
        for patient in tried:
            question = Question(action=action, type=kind, id=one, patient=patient)
            decision = self.enforcement.ask(question)
            if isinstance(decision, Allowed):
                found.append(decision)
                self.enforcement.trail.asked(question, decision)
        return found

    def _own_patients(self) -> list[str]:
        identified = self.enforcement.identified
        principal, grant = identified.principal, identified.break_glass
        own = {principal.patient} if principal.patient is not None else set()
        own |= principal.represents | (grant.patients if grant else frozenset())
        return sorted(own)[:MAX_TRIED]

    # --- Answers ----------------------------------------------------------------------------------

    def released(self, action: Action, record: Record, allowed: Allowed) -> Json:
        """Note that it goes out; give what of it may."""
        return self.shown(record, self._noted(action, record, allowed))

    def released_whole(
        self, action: Action, record: Record, allowed: Allowed
    ) -> Json | orjson.Fragment:
        """As `released`, for an answer that nobody looks into any more: maybe as finished JSON."""
        obligations = self._noted(action, record, allowed)
        if not isinstance(record.source, Opened):
            return self.shown(record, obligations)
        form = record.source.shown(obligations)
        if form is None:
            content = self.shown(record, obligations)
            record.source.remember(obligations, content, partial(self._marked, record, obligations))
            return content
        self.notices |= form.notices
        return orjson.Fragment(form.filled(record.source.values))

    def _noted(self, action: Action, record: Record, allowed: Allowed) -> tuple[Obligation, ...]:
        first, *others = self.questions(action, record)
        obligations = self.enforcement.release(first, allowed)
        for other in others:
            self.enforcement.trail.touched(other)
        return obligations

    def _marked(self, record: Record, obligations: Sequence[Obligation], content: Json) -> Json:
        """What `shown` makes of content in which marks stand for what was sealed."""
        masks = self.plan.masks(record.type)
        shown = carry_out(content, obligations, masks=masks, pseudonym=_no_pseudonym)
        return with_notice(shown, _notices(obligations))

    def shown(self, record: Record, obligations: Sequence[Obligation]) -> Json:
        """The record as far as these obligations let it be seen."""
        enforcement = self.enforcement
        purpose = enforcement.identified.purpose

        def pseudonym(path: str, value: str) -> str:
            return enforcement.sealer.pseudonym(purpose=purpose, kind=path, value=value)

        masks = self.plan.masks(record.type)
        with keys_at_hand():
            content = carry_out(record.content, obligations, masks=masks, pseudonym=pseudonym)
        notices = _notices(obligations)
        if notices:
            self.notices |= notices
            content = with_notice(content, notices)
        return content

    def withhold(self, action: Action, record: Record, denied: Denied) -> None:
        """Note that it stays."""
        self.enforcement.withhold(self.questions(action, record)[0], denied)

    def hidden(self, kind: str, obligations: Iterable[Obligation]) -> frozenset[str]:
        """Elements of a type that these obligations, and the masks, do not let be seen."""
        return hidden_paths(obligations, self.plan.masks(kind), kind)

    # --- What a denial tells (see the module) -----------------------------------------------------

    def refusal(
        self, action: Action, record: Record, denied: Denied
    ) -> GatewayError | RefusedError:
        """What to raise when one record asked for is denied."""
        if not record.known:
            return self.absent(record.type)
        kind = denied.remedy.kind
        if denied.failure is None and kind == "step_up" and self._factorless(record.type):
            return RefusedError(_NO_FACTOR)
        if denied.failure is None and not self._tells_nothing(action, record, denied):
            return self._nothing(record.type, denied)
        return RefusedError(denied)

    def absent(self, kind: str) -> GatewayError | RefusedError:
        """What to raise when there is no such record: the same as when it is hidden."""
        return self._nothing(kind, _ABSENT)

    def _nothing(self, kind: str, denied: Denied) -> GatewayError | RefusedError:
        # Without any second factor every record says "step up"; so must those that are not there.
        if self._factorless(kind):
            return RefusedError(_NO_FACTOR)
        if self.enforcement.trail.begun is not None and denied is _ABSENT:
            return UnsupportedError(NOTHING, status=HTTPStatus.NOT_FOUND)
        return RefusedError(denied, hide=True)

    def _factorless(self, kind: str) -> bool:
        principal = self.enforcement.identified.principal
        return (
            principal.kind == "user"
            and principal.assurance.second_factor == "none"
            and self._kind != "crisis"
            and is_patient_type(kind)
        )

    def _tells_nothing(self, action: Action, record: Record, denied: Denied) -> bool:
        ask = self.enforcement.ask
        opens = [
            ask(Question(action="read", type="Patient", id=patient, patient=patient))
            for patient in record.patients
        ]
        kind = denied.remedy.kind
        if kind == "step_up":
            return all(isinstance(one, Allowed) or one.remedy.kind == "step_up" for one in opens)
        if kind not in _ABOUT_PATIENT or not all(isinstance(one, Allowed) for one in opens):
            return False
        plain = [
            ask(Question(action=action, type=record.type, patient=patient))
            for patient in record.patients
        ]
        return any(isinstance(one, Denied) and one.reason == denied.reason for one in plain)


@contextmanager
def keys_at_hand() -> Iterator[None]:
    """Sealing and opening: what goes wrong with keys releases nothing."""
    try:
        yield
    except KeysError as error:
        raise UnavailableError("Keys that are needed cannot be used now.", error.code) from error


def _notices(obligations: Iterable[Obligation]) -> set[str]:
    return {one.notice for one in obligations if isinstance(one, RedisclosureNotice)}


def _no_pseudonym(*_: str) -> str:
    """A pseudonym belongs to one purpose."""
    raise UnkeptError


def _by_template(template: Template | None) -> Record | None:
    opened = template.opened() if template else None
    return template.record.with_source(opened) if template and opened else None
