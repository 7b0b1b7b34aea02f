"""The records of one answer: found, opened, labelled, decided, and made ready for release.

Before: `gateway.content.handler`, which knows whose request it is. Here every record stands for
itself; one that cannot be told whose it is, opened or labelled is not released.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from gateway.content import release
from gateway.content.fields import JSONFields
from gateway.content.pointers import JSON
from gateway.content.rules import Matched, Rule, codes_in, patient_id, patients_in, texts_in
from gateway.core.enforcement import Enforcement, Steps
from gateway.core.questions import Question, patient_reference
from gateway.errors import UpstreamContentError
from policies.errors import UnlabelledContentError
from policies.labels import Labels
from policies.model import Action, Allowed, Decision, Denied, Remedy
from policies.obligations import Obligation, join

_NOBODY_KNOWN = Denied(
    reason="It cannot be told whose record this is.",
    rules=(),
    remedy=Remedy(kind="operator"),
    failure="gateway.patient_unknown",
)
_NO_LABELS = Denied(
    reason="This record is too large or too deep to be looked through.",
    rules=(),
    remedy=Remedy(kind="operator"),
    failure="gateway.unlabelled",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One record after the decision. `question` is one of those that were asked about it."""

    content: JSON = field(repr=False)
    question: Question
    decision: Decision


def labels_of(enforcement: Enforcement, record: JSON, rule: Rule) -> Labels:
    """Labels from everything in it. Raises `UnlabelledContentError`."""
    kind = enforcement.route.settings.kind
    labels = enforcement.labeller.label(record, kind=kind).whole
    codes = codes_in(record, rule)
    return labels | enforcement.labeller.label_codes(codes, kind=kind) if codes else labels


def questions_about(
    record: JSON,
    matched: Matched,
    *,
    action: Action,
    patients: Collection[str],
    labels: Labels,
    authors: Iterable[str] | None = None,
) -> list[Question]:
    """The questions to ask about a record: one for each patient, or one about nobody."""
    rule = matched.rule
    ids = texts_in(record, rule.id)
    if authors is None:
        authors = texts_in(record, rule.author)
    named = frozenset(authors)
    if rule.author is None and matched.author:
        # Only where no record says it: the path is what the one who asks has written.
        named |= {matched.author}
    codes = frozenset(codes_in(record, rule)) if rule.codes else None
    return [
        Question(
            action=action,
            type=rule.type,
            id=ids[0] if ids else matched.id,
            patient=patient,
            authors=named,
            labels=labels,
            codes=codes,
        )
        for patient in (*sorted(patients),) or (None,)
    ]


def ask_all(enforcement: Enforcement, questions: Sequence[Question]) -> tuple[Question, Decision]:
    """One answer to all questions: the first denial, or everything that is asked for together."""
    obligations: list[Obligation] = []
    rules: dict[str, None] = {}
    for question in questions:
        decision = enforcement.ask(question)
        if isinstance(decision, Denied):
            return question, decision
        obligations += decision.obligations
        rules |= dict.fromkeys(decision.rules)
    return questions[0], Allowed(obligations=join(obligations), rules=tuple(rules))


def decide(
    enforcement: Enforcement,
    records: Sequence[JSON],
    matched: Matched,
    *,
    action: Action,
    fields: JSONFields,
    asked: frozenset[str],
    lenient: bool = False,
) -> Steps[list[Decided]]:
    """Decide each record of an answer by what it says itself.

    `asked` are patients that the request names, for rules that do not say where a record does.
    `lenient`: they also stand for a record that names nobody (the app's word to a write).
    """
    rule = matched.rule
    whose = [_patients(record, rule, asked, lenient=lenient) for record in records]
    yield from enforcement.know(frozenset[str]().union(*(one for one in whose if one)))
    texts = [text for record in records for text in fields.sealed_texts(record, rule.type)]
    yield from enforcement.load_keys(texts=texts)
    decided = []
    for record, patients in zip(records, whose, strict=True):
        decided.append(
            _decide_one(enforcement, record, matched, action=action, fields=fields, whose=patients)
        )
    return decided


def _decide_one(
    enforcement: Enforcement,
    record: JSON,
    matched: Matched,
    *,
    action: Action,
    fields: JSONFields,
    whose: frozenset[str] | None,
) -> Decided:
    rule = matched.rule
    nobody = Question(action=action, type=rule.type)
    if whose is None:
        return Decided(content=None, question=nobody, decision=_NOBODY_KNOWN)
    opened, broken = _opened(enforcement, record, rule, fields, whose)
    try:
        labels = labels_of(enforcement, opened, rule)
    except UnlabelledContentError:
        return Decided(content=None, question=nobody, decision=_NO_LABELS)
    questions = questions_about(opened, matched, action=action, patients=whose, labels=labels)
    question, decision = ask_all(enforcement, questions)
    if broken is not None and isinstance(decision, Allowed):
        # Only who might have seen it learns that it is damaged.
        raise broken
    return Decided(content=opened, question=question, decision=decision)


def _opened(
    enforcement: Enforcement,
    record: JSON,
    rule: Rule,
    fields: JSONFields,
    whose: frozenset[str],
) -> tuple[JSON, UpstreamContentError | None]:
    if not fields.sealed_texts(record, rule.type):
        return record, None
    if len(whose) != 1:
        return record, UpstreamContentError(
            "Sealed values stand in a record of several patients; say in the rule whose it is."
        )
    try:
        opened = fields.unprotect(
            record,
            rule.type,
            person=patient_reference(next(iter(whose))),
            service=enforcement.route.name,
            sealer=enforcement.sealer,
        )
    except UpstreamContentError as error:
        return record, error
    return opened, None


def _patients(
    record: JSON, rule: Rule, asked: frozenset[str], *, lenient: bool
) -> frozenset[str] | None:
    """Whose record it is: empty for a type without patients, None if that cannot be told."""
    if not rule.has_patients:
        return frozenset()
    if rule.patient is None or (lenient and not rule.patient.find(record)):
        return asked or None
    return patients_in(record, rule.patient)


def finish(
    enforcement: Enforcement, one: Decided, allowed: Allowed, rule: Rule, fields: JSONFields
) -> JSON:
    """Note that a record goes out, and do to it what is asked for.

    A pseudonym of the record's patient hangs on his own key, and ends with it.
    """
    obligations = enforcement.release(one.question, allowed)
    return fields.cleaned(_shown(enforcement, one, obligations, rule), rule.type)


def name_ahead(
    enforcement: Enforcement, going: Iterable[tuple[Decided, Allowed]], rule: Rule
) -> Steps[None]:
    """After it, `finish` asks nobody for a pseudonym. Raises `UnavailableError`."""
    for one, allowed in going:
        obligations = allowed.obligations
        show = partial(_shown, enforcement, one, obligations, rule)
        yield from enforcement.name_ahead(obligations, show)


def _shown(
    enforcement: Enforcement, one: Decided, obligations: Iterable[Obligation], rule: Rule
) -> JSON:
    purpose = enforcement.identified.purpose
    patients = patients_in(one.content, rule.patient) or frozenset()

    def pseudonym(path: str, value: str) -> str:
        patient = patient_id(value)
        if patient is not None and patient in {*patients, one.question.patient}:
            path, _, value = patient_reference(patient).partition("/")
        return enforcement.sealer.pseudonym(purpose=purpose, kind=path, value=value)

    return release.carry_out(one.content, rule.type, obligations, pseudonym=pseudonym)
