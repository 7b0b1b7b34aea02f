"""Checking a release with public keys alone, by somebody who was not there.

Proves that the study in it was signed by everybody it needed, that it stood in the cosigned log,
and that the document says of it what was signed. It cannot prove that the numbers are those that
the nodes' answers added up to: for that, the entry of the release in the log says their hash.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from audit.note import VerifierKey
from federated.errors import ManifestError
from federated.manifest import Study
from federated.release.document import study_part, trust_part
from federated.signed_study import TrustedKeys, parse_signed_study, verify_study
from federated.study_log import Remembered, StudyBundle, verify_bundle


def verify_document(
    document: Mapping[str, Any],
    trusted: TrustedKeys,
    *,
    origin: str,
    log_keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
) -> Study:
    """Return the study once everything about it is proven.

    Raises `ManifestError` for a document that does not say what was signed, `ApprovalError` where
    a signature is missing or wrong, `StudyLogError` where the publication is not proven.
    """
    try:
        evidence = document["evidence"]
        signed = parse_signed_study(evidence["signed_study"].encode())
        proof = base64.b64decode(evidence["log_proof"], validate=True)
        verify_study(signed, trusted)
        verify_bundle(
            StudyBundle(proof=proof, from_size=0, consistency=()),
            study_hash=signed.study.study_hash,
            remembered=Remembered.nothing(origin),
            log_keys=log_keys,
            witness_keys=witness_keys,
        )
        _verify_says(document, signed.study)
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ManifestError(
            "The document is malformed: it was changed after its release."
        ) from error
    return signed.study


def _verify_says(document: Mapping[str, Any], study: Study) -> None:
    privacy = document["privacy"]
    said = {
        "study": document["study"],
        "trust": document["trust"],
        "unit": privacy["unit"],
        "adjacency": privacy["adjacency"],
        "epsilon": privacy["approved_epsilon"],
        "delta": privacy["approved_delta"],
    }
    signed = {
        "study": study_part(study),
        "trust": trust_part(study),
        "unit": study.unit,
        "adjacency": study.adjacency,
        "epsilon": study.epsilon,
        "delta": study.delta,
    }
    for what, value in signed.items():
        if said[what] != value:
            raise ManifestError(f"The document says another `{what}` than was approved.")
    if privacy["epsilon"] > study.epsilon * (1 + 1e-6) or privacy["delta"] > study.delta:
        raise ManifestError("The document says that more was spent than was approved.")
    for answer in document["answers"]:
        query = study.query(answer["query"])
        noise = (answer["cost"]["mechanism"], answer["cost"]["scale"])
        if answer["ask"] != json.loads(query.ask):
            raise ManifestError(
                f"The answer {query.name} is to another question than was approved."
            )
        if noise != (query.noise.mechanism, query.noise.scale):
            raise ManifestError(f"The answer {query.name} had other noise than was approved.")
        if answer["people"] < study.minimum_cohort:
            raise ManifestError(f"The answer {query.name} has fewer people than was approved.")
