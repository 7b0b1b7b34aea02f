"""The answer of a study as JSON: everything that somebody needs who was not there.

Lives here: the form, how it is made from what a run gave, and its hash, which the audit log gets
before the answer is given out. Pure. The report for people is made from this document alone
(`federated.release.report`), so that both say the same.

The document carries its own evidence: the study with all signatures, and the proof that it was in
the study log. Whoever has the public keys can check both without asking anybody.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from audit.proof import parse_proof
from federated.errors import LedgerError, ManifestError
from federated.ledger_rows import Charge, parse_cost
from federated.manifest import Study, canonical_json
from federated.model import Answer, Estimate, PrivacyCost
from federated.planning import composed_epsilon
from federated.release.alarms import alarms
from federated.signed_study import SignedStudy
from federated.standing import Standing
from federated.study_log import StudyBundle
from federated.study_store import Step

if TYPE_CHECKING:
    from federated.learning.privacy_audit import AuditResult, NoiseCheck

FORMAT: Final = "havengate/release/v1"
MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
_MICROSECONDS: Final = 1_000_000


class AnsweredRound(Protocol):
    """What a release needs of `federated.study_run.RoundOutcome`."""

    @property
    def query(self) -> str:
        """The question's name."""
        ...

    @property
    def round_id(self) -> str:
        """The round's name in the ledger."""
        ...

    @property
    def answer(self) -> Answer:
        """The numbers."""
        ...

    @property
    def cost(self) -> PrivacyCost:
        """What it cost each person."""
        ...

    @property
    def people(self) -> int:
        """How many people's answers are in the sum; zeros of those who were not asked count."""
        ...

    @property
    def nodes(self) -> int:
        """How many nodes came to the end."""
        ...

    @property
    def dropped(self) -> Mapping[str, str]:
        """Node → why it did not."""
        ...


class TrainedModel(Protocol):
    """What a release needs of `federated.training_run.TrainedOutcome`."""

    @property
    def query(self) -> str:
        """The training's name."""
        ...

    @property
    def round_id(self) -> str:
        """The name in the ledger of the round that reserved for all."""
        ...

    @property
    def weights(self) -> NDArray[np.float64]:
        """As `learning.models` orders them, shape (parameters,)."""
        ...

    @property
    def asked(self) -> int:
        """Rounds that people were asked in."""
        ...

    @property
    def summed(self) -> int:
        """Rounds that came to a sum."""
        ...

    @property
    def cost(self) -> PrivacyCost:
        """What all rounds cost each person."""
        ...

    @property
    def people(self) -> int:
        """The fewest of any round."""
        ...

    @property
    def nodes(self) -> int:
        """The fewest of any round."""
        ...

    @property
    def audit(self) -> AuditResult | None:
        """What guessing canaries proved."""
        ...

    @property
    def noise(self) -> NoiseCheck | None:
        """How much noise was in the canaries' places."""
        ...


def make_document(
    standing: Standing,
    signed: SignedStudy,
    answers: Sequence[AnsweredRound],
    *,
    models: Sequence[TrainedModel] = (),
    failures: Mapping[str, str],
    bundle: StudyBundle,
    origin: str,
    charged: Sequence[Charge],
    run_id: int,
    at: float,
) -> dict[str, Any]:
    """Everything about one run, as plain values.

    `charged` is all that the study has ever cost, over all its runs, whether answered or not: the
    total is that. `origin` names the study log, `at` is Unix time in seconds.
    """
    study = standing.study
    published = parse_proof(bundle.proof).index
    trained = [_model(study, one) for one in models]
    return {
        "format": FORMAT,
        "alarms": alarms(trained),
        "study": study_part(study),
        "privacy": privacy_part(
            study,
            [(one.round, cost_part(one.cost)) for one in charged],
            epsilon=composed_epsilon(study, [one.cost for one in charged]),
        ),
        "trust": trust_part(study),
        "answers": [_answer(study, one) for one in answers],
        "models": trained,
        "failures": dict(failures),
        "approvals": [
            _approval(step, published=published) for step in standing.record.of("propose", *_WORDS)
        ],
        "evidence": {
            "signed_study": signed.encode().decode(),
            "log_origin": origin,
            "log_proof": base64.b64encode(bundle.proof).decode(),
        },
        "run": {"id": str(run_id), "at": int(at)},
    }


_WORDS: Final = ("approve", "publish")


def with_charges(
    document: Mapping[str, Any], study: Study, charged: Sequence[Charge]
) -> Mapping[str, Any]:
    """The document with all that the study has cost until now, the same one if that is no more.

    What it says already stays, also where the ledger lost it. Raises `ManifestError` if the
    document is damaged, `AccountingError` where there is no bound.
    """
    try:
        said = [(one["round"], one["cost"]) for one in document["privacy"]["charged"]]
        costs = [parse_cost(canonical_json(cost).decode()) for _, cost in said]
    except (KeyError, TypeError, LedgerError) as error:
        raise ManifestError("The kept answer is damaged: run the study again.") from error
    known = {name for name, _ in said}
    more = [one for one in charged if one.round not in known]
    if not more:
        return document
    return {
        **document,
        "privacy": privacy_part(
            study,
            [*said, *((one.round, cost_part(one.cost)) for one in more)],
            epsilon=composed_epsilon(study, [*costs, *(one.cost for one in more)]),
        ),
    }


def study_part(study: Study) -> dict[str, Any]:
    """What a document says of the study."""
    return {
        "id": study.id,
        "hash": study.study_hash,
        "title": study.title,
        "question": study.question,
        "purpose": study.purpose,
        "columns": list(study.columns),
        "sites": list(study.sites),
        "minimum_cohort": study.minimum_cohort,
        "code_hash": study.code_hash,
    }


def privacy_part(
    study: Study, charged: Sequence[tuple[str, Mapping[str, Any]]], *, epsilon: float
) -> dict[str, Any]:
    """What a document says that people's data cost: each round of the study, and all together."""
    return {
        "unit": study.unit,
        "adjacency": study.adjacency,
        "epsilon": epsilon,
        "delta": study.delta,
        "approved_epsilon": study.epsilon,
        "approved_delta": study.delta,
        "charged": [{"round": name, "cost": cost} for name, cost in charged],
    }


def cost_part(cost: PrivacyCost) -> dict[str, Any]:
    """What a document says of one round's cost."""
    return {
        "epsilon": cost.epsilon,
        "delta": cost.delta,
        "closeness": cost.closeness,
        "mechanism": cost.noise.mechanism,
        "scale": cost.noise.scale,
        "l1": cost.sensitivity.l1,
        "l2": cost.sensitivity.l2,
    }


def trust_part(study: Study) -> dict[str, Any]:
    """What a document says of whom one has to trust."""
    rules = study.aggregation
    return {
        "model": study.trust_model,
        "threshold": rules.threshold,
        "colluding": rules.colluding,
        "minimum_survivors": rules.minimum_survivors,
    }


def _answer(study: Study, one: AnsweredRound) -> dict[str, Any]:
    return {
        "query": one.query,
        "round": one.round_id,
        "ask": json.loads(study.query(one.query).ask),
        "people": one.people,
        "nodes": one.nodes,
        "dropped": len(one.dropped),
        "estimates": [_estimate(estimate) for estimate in one.answer.estimates],
        "cautions": list(one.answer.cautions),
        "cost": cost_part(one.cost),
    }


def _model(study: Study, one: TrainedModel) -> dict[str, Any]:
    audit, noise = one.audit, one.noise
    return {
        "query": one.query,
        "round": one.round_id,
        "ask": json.loads(study.query(one.query).ask),
        "people": one.people,
        "nodes": one.nodes,
        "asked": one.asked,
        "summed": one.summed,
        "weights": _weights_text(one.weights),
        "cost": cost_part(one.cost),
        "audit": None
        if audit is None
        else {
            "lower_bound": audit.lower_bound,
            "confidence": audit.confidence,
            "canaries": audit.canaries,
            "guesses": audit.guesses,
            "correct": audit.correct,
        },
        "noise": None
        if noise is None
        else {
            "share": noise.share,
            "short": list(noise.short),
            "false_alarm": noise.false_alarm,
            "passed": noise.passed,
        },
    }


def model_weights(model: Mapping[str, Any]) -> NDArray[np.float64]:
    """The weights of a document's model. Raises `ManifestError` for what is no such text."""
    try:
        raw = base64.b64decode(model["weights"], validate=True)
        weights = np.frombuffer(raw, dtype="<f8").astype(np.float64)
    except (binascii.Error, ValueError, TypeError, KeyError) as error:
        raise ManifestError("The weights in the document are malformed.") from error
    # Base64 has bits that say nothing: one model has one text.
    if _weights_text(weights) != model["weights"]:
        raise ManifestError("The weights in the document are not in their one form.")
    return weights


def _weights_text(weights: NDArray[np.float64]) -> str:
    return base64.b64encode(weights.astype("<f8").tobytes()).decode()


def _estimate(estimate: Estimate) -> dict[str, Any]:
    interval = estimate.interval
    return {
        "name": estimate.name,
        "value": estimate.value,
        "low": interval.low,
        "high": interval.high,
        "level": interval.level,
        "unit": estimate.unit,
    }


def _approval(step: Step, *, published: int) -> dict[str, Any]:
    return {
        "step": step.kind,
        "role": step.role,
        "site": step.site,
        "key": step.public_key,
        "at": step.at_us // _MICROSECONDS,
        # Of a publication that the log has twice, the entry that is proven.
        "log_index": published if step.kind == "publish" else step.log_index,
    }


def encode_document(document: Mapping[str, Any]) -> bytes:
    """The one form of its bytes. Raises `ManifestError` if a number of it is not finite."""
    return canonical_json(document)


def document_hash(document: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the document: what the entry of its release says."""
    return sha256(encode_document(document)).hexdigest()


def parse_document(data: bytes) -> dict[str, Any]:
    """Read a document: these very bytes are what its hash is of. Raises `ManifestError`."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ManifestError("The kept answer is larger than any.")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError("The kept answer is damaged: run the study again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ManifestError(f"The kept answer is not of the form {FORMAT}.")
    if encode_document(found) != data:
        raise ManifestError("The answer is not in its one form: it was changed after its release.")
    return found
