"""The guard's rules about a request as a whole: each raises `RefusedError` with its name.

Their order, and the rules about people and money, stand in `node.guard`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from federated.errors import ApprovalError, ManifestError, RefusedError
from federated.manifest import ConfigValue, DeclaredQuery, Study, roster_hash
from federated.node import enrolment as enrolments
from federated.node.columns import COLUMNS
from federated.node.contact import ContactRequest, parse_request, verify_request
from federated.node.enrolment import Enrolment
from federated.node.store import Store
from federated.signed_study import SignedStudy, parse_signed_study


def parse_contact(request: bytes | ContactRequest) -> tuple[ContactRequest, SignedStudy]:
    """Read a request and its study. Rule `manifest`."""
    try:
        if isinstance(request, bytes):
            request = parse_request(request)
        else:
            verify_request(request)
        return request, parse_signed_study(request.study)
    except (ManifestError, ApprovalError) as error:
        raise RefusedError(f"What was sent is not a study: {error}", rule="manifest") from error
    except ValueError as error:
        # Whatever a library makes of hostile bytes, such as text that is no UTF-8.
        raise RefusedError("What was sent is not a study.", rule="manifest") from error


def enrolment_of(store: Store) -> Enrolment:
    """What the node was enrolled with. Rule `signatures`: without it no signature counts."""
    try:
        return enrolments.enrolled(store)
    except ManifestError as error:
        raise RefusedError(str(error), rule="signatures") from error


def verify_roster(request: ContactRequest, study: Study, enrolled: Enrolment) -> None:
    """Who may take part is who was approved, and who does is among them. Rule `roster`."""
    if roster_hash(request.roster, request.sites) != study.roster:
        raise RefusedError("Others may take part than those who were approved.", rule="roster")
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
    if not study.valid_from <= now < study.valid_until:
        raise RefusedError("The study is not yet valid, or no longer.", rule="expired")


def asked_query(study: Study, request: ContactRequest) -> DeclaredQuery:
    """The question that is asked, all of it about the daily table. Rules `manifest`, `columns`."""
    try:
        query = study.query(request.query)
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


def verify_cohort(request: ContactRequest, study: Study, enrolled: Enrolment, held: int) -> None:
    """Enough people and nodes; `held` is how many people are here. Rule `cohort`."""
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
    if request.taking_part[enrolled.node] > held:
        raise RefusedError(
            "The server counts more people here than there are, so its cohort is not to be "
            "believed.",
            rule="cohort",
        )


def verify_claim(request: ContactRequest, enrolled: Enrolment, admitted: int) -> None:
    """No fewer people are claimed here than would answer. Rule `cohort`.

    The round's bound follows from what is claimed. Were it too low, whether this node's sum is
    within it, and so whether an answer comes, would tell of people's rows without any noise.
    """
    if request.taking_part[enrolled.node] < admitted:
        raise RefusedError(
            "The server counts fewer people here than would answer, so its bound is not to be "
            "believed.",
            rule="cohort",
        )


def typed(configuration: Mapping[str, ConfigValue]) -> dict[str, tuple[str, ConfigValue]]:
    """With the types: True, 1 and 1.0 are equal and not the same setting."""
    return {name: (type(value).__name__, value) for name, value in configuration.items()}
