"""The guard's rules about a request as a whole: each raises `RefusedError` with its name.

Their order, and the rules about people and money, stand in `node.guard`. A reason goes into a
person's receipt, so it is made of words that stand here, of numbers, and of what a *verified* study
says: never of what a server sent beside it, nor of a library's message about that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Final

from federated.errors import ApprovalError, ManifestError, RefusedError, StudyLogError
from federated.manifest import ConfigValue, DeclaredQuery, Study, roster_hash
from federated.model import PrivacyCost
from federated.node import enrolment as enrolments
from federated.node.columns import COLUMNS
from federated.node.contact import (
    ContactRequest,
    Question,
    parse_question,
    parse_request,
    verify_question,
    verify_request,
)
from federated.node.enrolment import Enrolment
from federated.node.store import Store
from federated.signed_study import SignedStudy, parse_signed_study, verify_study
from federated.study_log import Remembered, parse_bundle, verify_bundle

_SLACK: Final = 1e-9


def parse_contact(request: bytes | ContactRequest) -> tuple[ContactRequest, SignedStudy]:
    """Read a request and its study. Rule `manifest`."""
    try:
        if isinstance(request, bytes):
            request = parse_request(request)
        else:
            verify_request(request)
        return request, parse_signed_study(request.study)
    # Whatever a library makes of hostile bytes, such as text that is no UTF-8, is a ValueError.
    except (ManifestError, ApprovalError, ValueError) as error:
        raise _no_study() from error


def parse_greeted(question: bytes | Question) -> tuple[Question, SignedStudy]:
    """Read what a greeting asks about, and its study. Rule `manifest`."""
    try:
        if isinstance(question, bytes):
            question = parse_question(question)
        else:
            verify_question(question)
        return question, parse_signed_study(question.study)
    except (ManifestError, ApprovalError, ValueError) as error:
        raise _no_study() from error


def _no_study() -> RefusedError:
    return RefusedError(
        "What was sent is not a study, or not a request about one.", rule="manifest"
    )


def enrolment_of(store: Store) -> Enrolment:
    """What the node was enrolled with. Rule `signatures`: without it no signature counts."""
    try:
        return enrolments.enrolled(store)
    except ManifestError as error:
        raise RefusedError(str(error), rule="signatures") from error


def verify_signatures(signed: SignedStudy, enrolled: Enrolment) -> None:
    """Everybody who must agree did, by keys known since enrolment. Rule `signatures`."""
    try:
        verify_study(signed, enrolled.trusted())
    except (ApprovalError, ManifestError) as error:
        raise RefusedError(
            "The study is not signed by everybody who must agree, by keys that are known here.",
            rule="signatures",
        ) from error


def verify_log(
    proof: bytes, study: Study, enrolled: Enrolment, remembered: Remembered
) -> Remembered:
    """It was published; returns what to remember of the log from now on. Rule `study_log`."""
    try:
        return verify_bundle(
            parse_bundle(proof),
            study_hash=study.study_hash,
            remembered=remembered,
            log_keys=enrolled.log_verifiers(),
            witness_keys=enrolled.witness_verifiers(),
            witnesses=enrolled.witnesses,
        )
    except (StudyLogError, ManifestError, ValueError) as error:
        raise RefusedError(
            "That the study was published, in the log that this node follows and that a witness "
            "saw go on from where it was, is not proven.",
            rule="study_log",
        ) from error


def verify_run(study: Study, configuration: Mapping[str, ConfigValue], code_hash: str) -> None:
    """Code and whole configuration are those approved. Rules `code`, `run_configuration`."""
    if study.code_hash != code_hash:
        raise RefusedError(
            "The study was approved for another version of the program than the one that is "
            "installed here.",
            rule="code",
        )
    if typed(configuration) != typed(study.run_configuration()):
        raise RefusedError(
            "The run was started with other settings than those that were approved.",
            rule="run_configuration",
        )


def verify_approved(question: Question, study: Study, enrolled: Enrolment) -> None:
    """Who may take part is who was approved, this node among them. Rule `roster`."""
    if roster_hash(question.roster, question.sites) != study.roster:
        raise RefusedError("Others may take part than those who were approved.", rule="roster")
    if enrolled.node not in question.roster:
        raise RefusedError("This node is not among those that may take part.", rule="roster")


def verify_roster(request: ContactRequest, enrolled: Enrolment) -> None:
    """Who takes part is on the roster, this node among them. Rule `roster`."""
    if not request.taking_part.keys() <= request.roster.keys():
        raise RefusedError("Somebody takes part who is not on the roster.", rule="roster")
    if enrolled.node not in request.taking_part:
        raise RefusedError("This node is not among those that take part.", rule="roster")


def verify_terms(study: Study, enrolled: Enrolment, now: int) -> None:
    """A trust model that the node allows; within the study's time. `trust_model`, `expired`."""
    if study.trust_model == "trusted_server" and not enrolled.allow_trusted_server:
        raise RefusedError(
            "The study would show the coordinator each single answer, and this node does not "
            "allow that.",
            rule="trust_model",
        )
    verify_time(study, now)


def verify_time(study: Study, now: int) -> None:
    """Within the time that was approved. Rule `expired`."""
    if not study.valid_from <= now < study.valid_until:
        raise RefusedError("The study is not yet valid, or no longer.", rule="expired")


def asked_query(study: Study, name: str) -> DeclaredQuery:
    """The question that is asked, all of it about the daily table. Rules `manifest`, `columns`."""
    try:
        query = study.query(name)
    except ManifestError as error:
        raise RefusedError("The study does not ask this question.", rule="manifest") from error
    unknown = sorted(set(query.columns) - COLUMNS.keys())
    if unknown:
        raise RefusedError(
            f"The study asks for {unknown[0]}, which is not in the daily table.", rule="columns"
        )
    return query


def kind_of(query: DeclaredQuery) -> str:
    """The kind of a question, as consents name it; empty if it has none."""
    kind = json.loads(query.ask).get("kind")
    return kind if isinstance(kind, str) else ""


def verify_cohort(
    request: ContactRequest, study: Study, enrolled: Enrolment, admitted: int
) -> None:
    """Enough people and nodes; those who answer here are as many as are counted. Rule `cohort`.

    `admitted` is how many people here passed every rule about a person. If fewer are counted, the
    round's bound is too low, and whether this node's sum is within it would tell of people's rows;
    if more, then those who did not agree would help to fill a cohort that hides the others. Each
    node refuses for itself, so the counts of the nodes that answer add up to those who answer.
    """
    least = max(study.minimum_cohort, enrolled.minimum_cohort)
    people = sum(request.taking_part.values())
    if people < least:
        raise RefusedError(
            f"Too few people would take part: {people}. At least {least} must, so that nobody "
            "stands out.",
            rule="cohort",
        )
    if len(request.taking_part) < study.aggregation.minimum_survivors:
        raise RefusedError(
            f"{len(request.taking_part)} nodes would take part; the study promised at least "
            f"{study.aggregation.minimum_survivors}.",
            rule="cohort",
        )
    counted = request.taking_part[enrolled.node]
    if counted != admitted:
        raise RefusedError(
            f"The server counts {counted} people here; {admitted} would answer, so its cohort and "
            "its bound are not to be believed.",
            rule="cohort",
        )


def bounded_price(
    price: Callable[[Study, DeclaredQuery], PrivacyCost], study: Study, query: DeclaredQuery
) -> PrivacyCost:
    """What an answer costs a person: known, above 0, no dearer than promised. Rule `cost`."""
    try:
        cost = price(study, query)
    except Exception as error:
        # Of whatever kind: what cannot be computed is not bounded.
        raise RefusedError(
            "What an answer would cost cannot be bounded here.", rule="cost"
        ) from error
    # Said so that a figure that is no number is refused too.
    kept = 0 < cost.epsilon <= query.epsilon * (1 + _SLACK) and 0 <= cost.delta <= query.delta
    if not kept or cost.noise != query.noise:
        raise RefusedError(
            f"An answer would cost ε = {cost.epsilon:.3g}; the study promised {query.epsilon:.3g}.",
            rule="cost",
        )
    return cost


def known_rounds(rounds: Callable[[DeclaredQuery], int], query: DeclaredQuery) -> int:
    """How many rounds the answer takes; its price is that of all. Rule `cost`."""
    try:
        found = rounds(query)
    except Exception as error:
        raise RefusedError("How often it would ask is not known here.", rule="cost") from error
    if found < 1:
        raise RefusedError("How often it would ask is not known here.", rule="cost")
    return found


def typed(configuration: Mapping[str, ConfigValue]) -> dict[str, tuple[str, ConfigValue]]:
    """With the types: True, 1 and 1.0 are equal and not the same setting."""
    return {name: (type(value).__name__, value) for name, value in configuration.items()}
