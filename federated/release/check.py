"""Checking a release with public keys alone, by somebody who was not there.

Proves that the study in it was signed by everybody it needed, that it stood in the cosigned log,
and that all of the document that follows from what was signed does: the whole of it is made again
from the signed study, costs and total computed anew, and compared. What does not follow from
signatures (`COORDINATORS_WORD`: people, estimates, times, that no round is left out) is as the
coordinator gave it out: that it is unchanged since is proven by `federated.release.proof`, for the
log has the document's hash.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from audit.errors import AuditError
from audit.note import VerifierKey
from audit.proof import parse_proof
from federated.errors import BudgetExhaustedError, ManifestError
from federated.learning.evaluate import EvaluateQuery
from federated.learning.models import parameters
from federated.learning.one_run_bound import lower_bound
from federated.learning.privacy_audit import CONFIDENCE, FALSE_ALARM
from federated.learning.round_query import TrainQuery
from federated.manifest import Study, canonical_json
from federated.model import PrivacyCost
from federated.planning import composed_epsilon, study_costs, verify_within
from federated.questions import declared_question
from federated.release.alarms import alarms
from federated.release.document import (
    FORMAT,
    cost_part,
    model_weights,
    privacy_part,
    study_part,
    trust_part,
)
from federated.release.form import Answered, Cost, Form, Trained, parse_form
from federated.signed_study import SignedStudy, TrustedKeys, parse_signed_study, verify_study
from federated.standing import verify_enrolled
from federated.study_log import Remembered, StudyBundle, verify_bundle

#: What only the coordinator says, by path; `[]` stands for each of a list, `*` for each name.
#: Each cost follows from the study, and the total from the costs; that no round is left out, which
#: would make the total smaller, does not.
COORDINATORS_WORD: Final = (
    "answers[].people",
    "answers[].nodes",
    "answers[].dropped",
    "answers[].estimates[].name",
    "answers[].estimates[].value",
    "answers[].estimates[].low",
    "answers[].estimates[].high",
    "answers[].estimates[].level",
    "answers[].estimates[].unit",
    "answers[].cautions[]",
    "models[].people",
    "models[].nodes",
    "models[].asked",
    "models[].summed",
    "models[].weights",
    "models[].audit.guesses",
    "models[].audit.correct",
    "models[].noise.share",
    "models[].noise.short[]",
    "models[].noise.passed",
    "failures.*",
    "approvals[].at",
    "approvals[].log_index",
    "privacy.charged[]",
    "privacy.charged[].round",
    "privacy.epsilon",
    "run.id",
    "run.at",
)
#: What another machine's mathematics may make of the same ε.
_SAME: Final = 1e-9
#: The same of an audit's bound, in units of ε: bisection stops that near to it.
_SAME_BOUND: Final = 1e-8


def verify_document(
    document: Mapping[str, Any],
    trusted: TrustedKeys,
    *,
    origin: str,
    log_keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
    witnesses: int = 1,
) -> Study:
    """Return the study once everything about it is proven.

    `witnesses` must have cosigned, by name. Raises `ManifestError` for a document that does not say
    what was signed, `ApprovalError` where a signature is missing or wrong, `StudyLogError` where
    the publication is not proven.
    """
    given = canonical_json(document)
    found = parse_form(document)
    # A lone surrogate is no text; whatever stands for it was not signed.
    signed = parse_signed_study(found.evidence.signed_study.encode(errors="replace"))
    _verify_signed(signed, trusted)
    proof = _proof_of(found)
    verify_bundle(
        StudyBundle(proof=proof, from_size=0, consistency=()),
        study_hash=signed.study.study_hash,
        remembered=Remembered.nothing(origin),
        log_keys=log_keys,
        witness_keys=witness_keys,
        witnesses=witnesses,
    )
    made = _made_again(found, signed, proof, origin)
    if canonical_json(made) != given:
        path = _difference(json.loads(given), json.loads(canonical_json(made)), "")
        raise ManifestError(
            f"The document says another `{path}` than follows from what was signed."
        )
    return signed.study


def _proof_of(found: Form) -> bytes:
    try:
        return base64.b64decode(found.evidence.log_proof, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ManifestError("The proof of publication is malformed.") from error


def _verify_signed(signed: SignedStudy, trusted: TrustedKeys) -> None:
    verify_study(signed, trusted)
    places = [(one.role, one.site, one.public_key) for one in signed.signatures]
    if len(set(places)) != len(places):
        raise ManifestError("The study in the document carries one signature twice.")
    for one in signed.signatures:
        # On a device an unknown key counts for nothing; here it would be shown as an approval.
        verify_enrolled(signed.study, one, trusted)


def _made_again(found: Form, signed: SignedStudy, proof: bytes, origin: str) -> dict[str, Any]:
    study = signed.study
    costs = study_costs(study)
    _verify_asked(found, study)
    charged = {one.round: _known(one.cost, list(costs.values())) for one in found.privacy.charged}
    for one in found.parts():
        if one.round not in charged or charged[one.round] != costs[one.query]:
            raise ManifestError(f"The answer {one.query} cost another sum than was charged.")
    models = [_model(one, study, costs[one.query]) for one in found.models]
    return {
        "format": FORMAT,
        "alarms": alarms(models),
        "study": study_part(study),
        "privacy": privacy_part(
            study,
            [(one.round, _cost(one.cost, charged[one.round])) for one in found.privacy.charged],
            epsilon=_total(found, study, list(charged.values())),
        ),
        "trust": trust_part(study),
        "answers": [_answer(one, study, costs[one.query]) for one in found.answers],
        "models": models,
        "failures": dict(found.failures),
        "approvals": _approvals(found, signed, proof),
        "evidence": {
            "signed_study": signed.encode().decode(),
            "log_origin": origin,
            "log_proof": base64.b64encode(proof).decode(),
        },
        "run": {"id": found.run.id, "at": found.run.at},
    }


def _verify_asked(found: Form, study: Study) -> None:
    """Each question is answered, in the study's order and by enough people, or has a reason."""
    asked = [query.name for query in study.queries]
    answered: set[str] = set()
    for listed in (found.answers, found.models):
        names = [one.query for one in listed]
        if [name for name in asked if name in names] != names:
            raise ManifestError(
                "The document answers what the study does not ask, or in another order."
            )
        answered |= set(names)
    if set(found.failures) != set(asked) - answered:
        raise ManifestError("The document does not say of each question what became of it.")
    for one in found.parts():
        _verify_part(one, study, found.run.id, answered)
    if not found.run.id.isdecimal():
        raise ManifestError("The document is of no run.")


def _verify_part(one: Answered | Trained, study: Study, run_id: str, answered: set[str]) -> None:
    """It is what its question asks for, of enough people, and of a run that it can be of."""
    query = declared_question(study.query(one.query).ask)
    if isinstance(one, Trained) != isinstance(query, TrainQuery):
        raise ManifestError(f"The document says of {one.query} what it cannot be.")
    if isinstance(one, Trained) and isinstance(query, TrainQuery):
        _verify_model(one, query)
    if isinstance(query, EvaluateQuery) and query.spec.name not in answered:
        raise ManifestError(f"The answer {one.query} judges a model that is not there.")
    least = max(study.minimum_cohort, int(getattr(query, "minimum_cohort", 0)))
    if one.people < least * query.gap or one.nodes < study.aggregation.minimum_survivors:
        raise ManifestError(f"The answer {one.query} has fewer people or nodes than was approved.")
    run = one.round.partition("-")[0]
    # A training may have begun in an earlier run of the study.
    if not (run == run_id or (isinstance(one, Trained) and run.isdecimal())):
        raise ManifestError(f"The answer {one.query} is of another run.")


def _verify_model(one: Trained, query: TrainQuery) -> None:
    """Its weights are a model of the declaration; it was audited as that says."""
    weights = model_weights({"weights": one.weights})
    if weights.shape != (parameters(query.spec),) or not np.isfinite(weights).all():
        raise ManifestError(f"The weights of {one.query} are no such model.")
    # Only a rule that was signed ends a training before its last round.
    least = 1 if query.stop is not None else query.rounds
    audit, noise = one.audit, one.noise
    canaries = None if audit is None else audit.canaries
    if not least <= one.asked <= query.rounds or canaries != (query.canaries or None):
        raise ManifestError(f"The model {one.query} was trained or audited otherwise than signed.")
    if audit and noise and (audit.confidence, noise.false_alarm) != (CONFIDENCE, FALSE_ALARM):
        raise ManifestError(f"The audit of the model {one.query} was less sure than it has to be.")


def _known(given: Cost, costs: Sequence[PrivacyCost]) -> PrivacyCost:
    """Which of the study's costs it is, as they are computed here."""
    for one in costs:
        if _cost(given, one) == msgspec.to_builtins(given):
            return one
    raise ManifestError(
        "The document charges what none of the study's questions costs, or was made with a release "
        "that computes costs otherwise."
    )


def _cost(given: Cost, true: PrivacyCost) -> dict[str, Any]:
    """The true cost, with the given ε if it differs by rounding alone."""
    made = cost_part(true)
    if math.isclose(given.epsilon, true.epsilon, rel_tol=_SAME):
        made["epsilon"] = given.epsilon
    return made


def _total(found: Form, study: Study, costs: Sequence[PrivacyCost]) -> float:
    try:
        verify_within(study, costs)
    except BudgetExhaustedError as error:
        raise ManifestError(f"More was spent than was approved: {error}") from error
    total = composed_epsilon(study, costs)
    given = found.privacy.epsilon
    return given if math.isclose(given, total, rel_tol=_SAME) else total


def _answer(one: Answered | Trained, study: Study, cost: PrivacyCost) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(one),
        "ask": json.loads(study.query(one.query).ask),
        "cost": _cost(one.cost, cost),
    }


def _model(one: Trained, study: Study, cost: PrivacyCost) -> dict[str, Any]:
    """With the bound that the audit's counts prove, whatever bound is given."""
    made = _answer(one, study, cost)
    audit = one.audit
    if audit is not None:
        proven = lower_bound(
            canaries=audit.canaries,
            guesses=audit.guesses,
            correct=audit.correct,
            delta=cost.delta,
            confidence=audit.confidence,
        )
        if not math.isclose(audit.lower_bound, proven, rel_tol=0, abs_tol=_SAME_BOUND):
            made["audit"]["lower_bound"] = proven
    return made


def _approvals(found: Form, signed: SignedStudy, proof: bytes) -> list[dict[str, Any]]:
    """The proposal, then who signed, in the order of the signatures, with the given times."""
    who = [("propose", "researcher", "", "")]
    for one in signed.signatures:
        step = "publish" if one.role == "coordinator" else "approve"
        who.append((step, one.role, one.site, one.public_key.hex()))
    if len(who) != len(found.approvals):
        raise ManifestError("The document names other approvals than the study carries.")
    try:
        published = parse_proof(proof).index
    except AuditError as error:
        raise ManifestError("The proof of publication is malformed.") from error
    return [
        {
            "step": step,
            "role": role,
            "site": site,
            "key": key,
            "at": given.at,
            "log_index": published if step == "publish" else given.log_index,
        }
        for (step, role, site, key), given in zip(who, found.approvals, strict=True)
    ]


def _difference(given: Any, made: Any, path: str) -> str:
    """The path of the first difference."""
    if isinstance(given, dict) and isinstance(made, dict) and given.keys() == made.keys():
        for name in sorted(given):
            if canonical_json(given[name]) != canonical_json(made[name]):
                return _difference(given[name], made[name], f"{path}.{name}".lstrip("."))
    if isinstance(given, list) and isinstance(made, list) and len(given) == len(made):
        for place, (one, other) in enumerate(zip(given, made, strict=True)):
            if canonical_json(one) != canonical_json(other):
                return _difference(one, other, f"{path}[{place}]")
    return path
