"""Writes to an app that does not speak FHIR: whose record it is comes first.

Every patient that the request or the record as it is now names is asked for; one denial stops the
write before anything is sent. The body goes on as it was understood, with its fields sealed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus

from gateway.content import bodies, release
from gateway.content.overwriting import (
    LEAVE_OUT,
    Inner,
    ids_asked,
    ids_in,
    objects_within,
    verify_none_within,
    verify_same,
    verify_shape,
)
from gateway.content.pointers import JSON, Pointer
from gateway.content.reading import Reading, absent
from gateway.content.records import decide, labels_of, questions_about
from gateway.content.rules import Matched, Rule, Rules, patients_in
from gateway.core.commands import Fetched
from gateway.core.enforcement import Question, RefusedError, Reply, Steps
from gateway.core.messages import RequestHead
from gateway.core.questions import patient_reference
from gateway.errors import BadRequestError, UnsupportedError, UpstreamContentError
from policies.errors import UnlabelledContentError
from policies.model import Allowed, Denied
from policies.obligations import Obligation, join

_CHANGES = frozenset({"PUT", "PATCH", "DELETE"})
_HIDE_FROM = frozenset({"PUT", "PATCH"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """One write. `shows`: it is a POST that only asks, so a denied answer is a refusal."""

    reading: Reading
    rules: Rules
    shows: bool

    @property
    def _rule(self) -> Rule:
        return self.reading.rule

    def write(self, body: bytes, query: str) -> Steps[Reply]:
        """The whole of a POST, PUT, PATCH or DELETE."""
        asking = self.reading.enforcement
        content, is_json = bodies.parse_request(asking.head, body)
        bodies.check_body(asking.head, content, body)
        if body and not is_json:
            self._refuse_unseen()
        records = content if isinstance(content, list) else [content] if is_json else []
        self._refuse_no_objects(records)
        self._refuse_two_readings(content, records)
        if len(records) > asking.limits.looked_through:
            raise BadRequestError("Send fewer records at once.", status=413)
        named = self.reading.named()
        told = named | self._told(content, records)
        ids = self._looked_within(content, records, told)
        prior = yield from self._before(query, ids, records, named, told)
        before = [] if prior is None else [question for question in prior if question.patient]
        concerned = told | {one.patient for one in before if one.patient is not None}
        if self._rule.has_patients and not concerned and not self.shows:
            raise UnsupportedError(
                "Whose record this is must be in the request before anything is written."
            )
        yield from asking.know(concerned)
        overwrites = asking.head.method == "POST" and prior is not None
        questions = self._questions(records, told, before or prior or [], overwrites=overwrites)
        # Where it is not read, something may be there.
        replaced = before if self._rule.patient is not None or overwrites else questions
        obligations = join(
            one for question in questions for one in asking.demand(question).obligations
        )
        if overwrites or asking.head.method in _HIDE_FROM:
            self._refuse_hidden(obligations, replaced)
        yield from asking.begin()
        sent = body
        if is_json:
            sent = yield from self._sealed(content, told or concerned)
        head = bodies.upstream_head(asking.head, query=query, reading=False)
        fetched = yield from asking.fetch(head, sent)
        action = self._rule.action_for(asking.head.method) if self.shows else "read"
        return (
            yield from self.reading.reply(
                fetched,
                action=action,
                asked=concerned,
                obligations=obligations,
                written=not self.shows,
            )
        )

    # --- Whose it is ------------------------------------------------------------------------------

    def _told(self, content: JSON, records: list[JSON]) -> frozenset[str]:
        """Patients that the body names. One that cannot be read stops the write."""
        rule = self._rule
        told = _named(content, rule.request_patient) | self._asked_beside()
        for record in records:
            told |= _named(record, rule.patient)
            if rule.patient_parameter:
                told |= _named(record, Pointer((rule.patient_parameter,)))
        pointer = self._rule.patient
        each = pointer is not None and len(records) > 1 and not self.reading.named()
        if each and not all(_named(record, pointer) for record in records):
            raise UnsupportedError("Each record of a list must say whose it is.")
        return told

    def _asked_beside(self) -> frozenset[str]:
        """Patients that the query names by the name of the member in the body."""
        query = self.reading.enforcement.head.query
        told: set[str] = set()
        for pointer in (self._rule.request_patient, self._rule.patient):
            if pointer is None or len(pointer.steps) != 1:
                continue
            value = bodies.parameter(query, pointer.steps[0])
            if value is not None:
                told |= _named([value], Pointer(("0",)))
        return frozenset(told)

    def _looked_within(
        self, content: JSON, records: list[JSON], told: frozenset[str]
    ) -> frozenset[str]:
        """The ids that the records have. Objects within them hide nothing that matters."""
        fields, type_ = self.reading.fields, self._rule.type
        sealed = [one.pointer for one in fields.of(type_) if one.seal]
        within = [inner for record in records for inner in objects_within(record, sealed)]
        verify_none_within(within, fields.pointers(type_))
        pointed = (self._rule.patient, self._rule.author, self._rule.id)
        if isinstance(content, dict) and self._rule.request_patient:
            verify_shape(content, [self._rule.request_patient])
        for record in records:
            verify_shape(record, (*fields.pointers(type_), *(one for one in pointed if one)))
        self._refuse_others_within(records, within, told)
        if self.shows:
            return frozenset()
        ids = ids_in(records, within, self._rule, sealed=bool(sealed))
        head = self.reading.enforcement.head
        if head.method in _CHANGES and self._rule.patient is not None:
            # The record as it is now is read with the same query.
            return ids
        return ids | ids_asked(bodies.parameters(head.query), self._rule)

    def _before(
        self,
        query: str,
        ids: frozenset[str],
        records: list[JSON],
        named: frozenset[str],
        told: frozenset[str],
    ) -> Steps[list[Question] | None]:
        """Questions about the record as it is now; None where it does not matter, or is not there.

        Raises `RefusedError`, as if it were not there for those who may not know of it.
        """
        method, matched = self.reading.enforcement.head.method, self.reading.matched
        if method == "POST":
            return (yield from self._overwritten(records, ids, told)) if ids else None
        if method not in _CHANGES or self._rule.patient is None:
            verify_same(ids, {matched.id})
            return None
        head = bodies.upstream_head(self.reading.enforcement.head, query=query, reading=True)
        prior = yield from self._prior(head, matched, method, named)
        if prior is None and method != "PUT":
            raise UnsupportedError("There is nothing here.", status=404)
        verify_same(ids, {matched.id, *(one.id for one in prior or ())})
        return prior

    def _overwritten(
        self, records: list[JSON], ids: frozenset[str], told: frozenset[str]
    ) -> Steps[list[Question] | None]:
        """The same for a POST that names an id. An app may take it for a change of that record."""
        if len(records) > 1:
            raise UnsupportedError("Send records that have an id one by one.")
        if len(ids) > 1:
            raise UnsupportedError(LEAVE_OUT)
        [id_] = ids
        patient = next(iter(told)) if len(told) == 1 else None
        places = self.rules.places_of(self._rule.type, id_, patient)
        if not places:
            raise UnsupportedError(LEAVE_OUT)
        path, matched = places[0]
        asked = frozenset({matched.patient} if matched.patient is not None else told)
        head = bodies.upstream_head(self.reading.enforcement.head, query="", reading=True)
        prior = yield from self._prior(replace(head, path=path), matched, "PUT", asked)
        if prior is None and matched.rule.names_patient_in_path:
            # Not among this patient's, which does not say that it is nobody's.
            raise UnsupportedError(LEAVE_OUT)
        return prior

    def _prior(
        self, head: RequestHead, matched: Matched, method: str, named: frozenset[str]
    ) -> Steps[list[Question] | None]:
        asking, rule = self.reading.enforcement, matched.rule
        action = self._rule.action_for(method) if method == asking.head.method else "update"
        fetched = yield from asking.fetch(head)
        if absent(fetched):
            return None
        record = _record(fetched)
        [seen] = yield from decide(
            asking, [record], matched, action=action, fields=self.reading.fields, asked=named
        )
        if isinstance(seen.decision, Denied):
            hide = not self.reading.may_know_of(seen.question)
            raise RefusedError(seen.decision, hide=hide)
        if method == "PUT" and self.reading.fields.hidden_from_all(record, rule.type):
            raise UnsupportedError(
                "A value that is masked for everybody would be lost: change the rest with PATCH."
            )
        patients = patients_in(record, rule.patient) or frozenset()
        if rule.patient is None:
            patients = named
        return questions_about(
            seen.content, matched, action=action, patients=patients, labels=seen.question.labels
        )

    def _questions(
        self,
        records: list[JSON],
        told: frozenset[str],
        before: list[Question],
        *,
        overwrites: bool,
    ) -> list[Question]:
        """What must all be allowed: of what is there now, and of what it would become."""
        asking = self.reading.enforcement
        actions = [self._rule.action_for(asking.head.method)]
        actions += ["update"] if overwrites else []
        authors = {one for question in before for one in question.authors} if before else None
        questions = list(before)
        for record in records or [None]:
            try:
                labels = labels_of(asking, record, self._rule)
            except UnlabelledContentError as error:
                raise BadRequestError(
                    "The body is nested too deeply or has too many values.", status=413
                ) from error
            for question in before:
                labels |= question.labels
            patients = told or {one.patient for one in before if one.patient is not None}
            for action in actions:
                questions += questions_about(
                    record,
                    self.reading.matched,
                    action=action,
                    patients=patients,
                    labels=labels,
                    authors=authors,
                )
        return questions

    # --- What may not go on -----------------------------------------------------------------------

    @property
    def _looked_into(self) -> bool:
        """Whether anything in the body matters; an id does wherever it could name a patient's."""
        rule = self._rule
        pointed = (rule.request_patient, rule.patient, rule.author, rule.id, *rule.codes)
        by_id = not self.shows and self.rules.belong_to_patients(rule.type)
        return by_id or any(pointed) or bool(self.reading.fields.of(rule.type))

    def _refuse_unseen(self) -> None:
        merged = self._rule.patient_parameter and bodies.is_form(self.reading.enforcement.head)
        if merged or self._looked_into:
            raise UnsupportedError("Send JSON here: the body must be looked into.", status=415)

    def _refuse_no_objects(self, records: list[JSON]) -> None:
        """In what is no object nothing is found, but an app may take it for a record."""
        if self._looked_into and not all(isinstance(record, dict) for record in records):
            raise UnsupportedError("Send a JSON object here, or a list of objects.")

    def _refuse_others_within(
        self, records: list[JSON], within: list[Inner], told: frozenset[str]
    ) -> None:
        """Refuse an object inside of a record that names another patient than is asked about."""
        for pointer in (self._rule.request_patient, self._rule.patient):
            if pointer is None:
                continue
            near = [one.content for one in within if one.near([pointer])]
            for record in (*records, *near):
                if pointer.misspelt(record) or not _named(record, pointer) <= told:
                    raise BadRequestError(
                        "Another patient is named within the body: send his records alone."
                    )

    def _refuse_two_readings(self, content: JSON, records: list[JSON]) -> None:
        """Refuse what some app would read otherwise than it is read here."""
        rule = self._rule
        if isinstance(content, list) and self.reading.enforcement.head.method == "PATCH":
            raise UnsupportedError("Send a merge patch (RFC 7396), not a list.", status=415)
        whole = [rule.request_patient] if rule.request_patient else []
        each = [one for one in (rule.patient, rule.author, rule.id) if one]
        each += [one.pointer for one in rule.codes]
        if rule.patient_parameter:
            each.append(Pointer((rule.patient_parameter,)))
        if any(one.misspelt(content) for one in whole) or any(
            self.reading.fields.misspelt(record, rule.type)
            or any(one.misspelt(record) for one in each)
            for record in records
        ):
            raise BadRequestError(
                "A member is nearly called like one that matters here: use its spelling."
            )

    def _refuse_hidden(self, obligations: Iterable[Obligation], replaced: list[Question]) -> None:
        """Who does not see all of a record, changing or reading it, must not write all of it."""
        asking, type_ = self.reading.enforcement, self._rule.type
        shown = [asking.ask(replace(one, action="read")) for one in replaced]
        hidden = [one.obligations for one in shown if isinstance(one, Allowed)]
        if any(release.hides(one, type_) for one in (obligations, *hidden)):
            raise UnsupportedError("You do not see all of this record, so you cannot replace it.")

    # --- Sealing ----------------------------------------------------------------------------------

    def _sealed(self, content: JSON, told: frozenset[str]) -> Steps[bytes]:
        fields, asking = self.reading.fields, self.reading.enforcement
        type_ = self._rule.type
        if not fields.of(type_):
            return bodies.dump_json(content)
        records = content if isinstance(content, list) else [content]
        persons = [self._person(record, told) for record in records]
        yield from asking.load_keys(persons=[one for one in persons if one])
        sealed = []
        for record, person in zip(records, persons, strict=True):
            protect = partial(
                fields.protect,
                record,
                type_,
                person=person,
                service=asking.route.name,
                sealer=asking.sealer,
            )
            sealed.append((yield from asking.at_hand(protect)))
        return bodies.dump_json(sealed if isinstance(content, list) else sealed[0])

    def _person(self, record: JSON, told: frozenset[str]) -> str:
        patients = _named(record, self._rule.patient) or told
        if self._rule.has_patients and len(patients) != 1:
            raise UnsupportedError("Protected values need one patient whose they are.")
        return patient_reference(next(iter(patients))) if patients else ""


def _named(content: JSON, pointer: Pointer | None) -> frozenset[str]:
    """Patients at a pointer: none if nothing stands there.

    Raises `BadRequestError` for what stands there and names none.
    """
    if pointer is None or not pointer.find(content):
        return frozenset()
    patients = patients_in(content, pointer)
    if patients is None:
        raise BadRequestError(
            "Expected the id of a patient where the rule says, got another value."
        )
    return patients


def _record(fetched: Fetched) -> JSON:
    """The record as it is now."""
    if fetched.head.status == HTTPStatus.OK and bodies.is_json(
        fetched.head.headers.get("content-type")
    ):
        try:
            record = bodies.parse_json(fetched.body)
        except ValueError:
            record = None
        if isinstance(record, dict):
            return record
    raise UpstreamContentError(
        "Expected the record as it is now, to see whose it is, got no JSON object; see the rule of "
        "this route for the path."
    )
