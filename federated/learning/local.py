"""One round's work for one person: gradient descent from the weights that came.

No clipping and no noise here; `round_query` does both after it, and trusts nothing of this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from federated.learning.models import gradient, parameters
from federated.learning.personal import body_change
from federated.learning.spec import Examples, TrainSpec


def update(
    spec: TrainSpec, weights: NDArray[np.float64], examples: Examples
) -> NDArray[np.float64]:
    """The change that `spec.work` makes to `weights`: shape (parameters,), finite, unclipped.

    Of the body alone where the head is personal: it is made and left behind here (`personal`).

    Zeros without examples, for weights of another length, and wherever anything on the way is no
    finite number. What data or weights hold raises nothing.
    """
    nothing = np.zeros(parameters(spec))
    start = np.asarray(weights, dtype=np.float64)
    if start.shape != nothing.shape or not len(examples.y):
        return nothing
    if not all(np.isfinite(part).all() for part in (start, examples.x, examples.y)):
        return nothing
    if spec.personal is not None:
        change = body_change(spec, start, examples)
        return change if np.isfinite(change).all() else nothing
    at = start.copy()
    with np.errstate(all="ignore"):
        for _ in range(spec.work.epochs):
            at -= spec.work.rate * gradient(spec, at, examples)
        change = at - start
    return change if np.isfinite(change).all() else nothing
