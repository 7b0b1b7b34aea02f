"""What an audit found against a released model: said first, wherever the release is shown.

Lives here: what counts as a finding, and its words. A finding follows from the document's own
figures, so a document that leaves one out is refused by whoever checks it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from federated.release.figures import number

#: Guessing canaries proved more than the ε that is claimed.
CLAIM_REFUTED: Final = "claim_refuted"
#: There was less noise in the canaries' places than was paid for.
NOISE_MISSING: Final = "noise_missing"


def alarms(models: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The findings against a document's models, in their order; none where nothing was found."""
    return [
        {"query": one["query"], "finding": finding} for one in models for finding in findings(one)
    ]


def findings(model: Mapping[str, Any]) -> Iterator[str]:
    """The findings against one model of a document."""
    audit, noise = model["audit"], model["noise"]
    if audit is not None and audit["lower_bound"] > model["cost"]["epsilon"]:
        yield CLAIM_REFUTED
    if noise is not None and not noise["passed"]:
        yield NOISE_MISSING


def alarm_words(document: Mapping[str, Any]) -> list[str]:
    """A sentence or two for each finding, for people."""
    return [words for one in document["models"] for words in _words(one)]


def _words(model: Mapping[str, Any]) -> Iterator[str]:
    name, claimed = model["query"], number(model["cost"]["epsilon"])
    for finding in findings(model):
        if finding == CLAIM_REFUTED:
            audit = model["audit"]
            yield (
                f"The audit refutes the privacy that is claimed for the model {name}: ε is above "
                f"{number(audit['lower_bound'])}, not {claimed} as claimed. An audit says so of "
                f"at most {100 * (1 - audit['confidence']):.3g} in 100 trainings that keep their "
                "claim. Do not rely on the ε of this release before the cause is known."
            )
        else:
            noise = model["noise"]
            rounds = ", ".join(str(one + 1) for one in noise["short"])
            where = f", and too little in sum {rounds}" if rounds else ""
            yield (
                f"There was less noise in the sums of the model {name} than was paid for: "
                f"{100 * noise['share']:.3g} % of the planned variance in all{where}. Its true ε "
                f"may be larger than the {claimed} that is claimed. Noise as planned is found too "
                f"small in one of {1 / noise['false_alarm']:,.0f} trainings."
            )
