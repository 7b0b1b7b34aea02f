"""Every question that can be asked, from its declaration: statistics and learning.

The one place that knows both; `analytics.declare` and `learning.declare` say how each is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from federated.analytics import declare as statistics
from federated.analytics.base import BaseQuery
from federated.errors import ManifestError
from federated.learning import declare as learning
from federated.learning.evaluate import EvaluateQuery
from federated.learning.round_query import TrainQuery
from federated.model import Query

#: Kinds of questions, as consents name them.
KINDS: Final = (*statistics.KINDS, *learning.KINDS)


def question_from(ask: Mapping[str, Any]) -> BaseQuery | TrainQuery | EvaluateQuery:
    """The question of a declaration. Raises `ManifestError`, one line for the first mistake."""
    if ask.get("kind") in learning.KINDS:
        return learning.learning_from(ask)
    return statistics.query_from(ask)


def declared_question(ask: str) -> BaseQuery | TrainQuery | EvaluateQuery:
    """The same from a declaration as a study holds it, in JSON. Raises `ManifestError`."""
    try:
        return question_from(msgspec.json.decode(ask, type=dict[str, Any]))
    except msgspec.DecodeError as error:
        raise ManifestError("A query's declaration is malformed.") from error


def verify_together(queries: Sequence[Query]) -> None:
    """What must hold among one study's questions. Raises `ManifestError`."""
    learning.verify_pairs(queries)
