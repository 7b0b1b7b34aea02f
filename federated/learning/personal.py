"""Heads that stay on the device: made anew in each round, never sent, never stored.

After Singhal et al., "Federated Reconstruction: Partially Local Federated Learning" (2021). The
*head* is a model's last layer (of a logistic or linear model its bias), the *body* the rest. Where
`spec.personal` is given, weights everywhere are the body's alone: `models.parameters` counts no
head, and so no vector that is summed has room for one. A device starts from a head that is public
and the same for all, descends on the older part of the person's own examples with the body as it
came, and uses the result on the newer part: to train the body, or to predict. Nothing is kept from
round to round, so a device that was away needs nothing.

Privacy is that of any update: whatever the head was, the body's change is clipped and rounded after
it. Pure, and total as `local` is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.learning.models import gradient, initial, parameters, predict
from federated.learning.spec import Examples, PersonalHead, TrainSpec

#: A part of the format: other devices would start from another head with another.
_SEED: Final = b"personal-head"

type _Floats = NDArray[np.float64]


@lru_cache(maxsize=64)
def whole(spec: TrainSpec) -> TrainSpec:
    """The same model with its head, as `models.predict` and `models.gradient` take it."""
    return replace(spec, personal=None)


def older_and_newer(spec: TrainSpec, examples: Examples) -> tuple[Examples, Examples]:
    """What the head is made of, and what it is used on: the newer part is never empty."""
    count = int(len(examples.y) * _head(spec).older)
    return (
        Examples(x=examples.x[:count], y=examples.y[:count]),
        Examples(x=examples.x[count:], y=examples.y[count:]),
    )


def reconstructed(spec: TrainSpec, body: NDArray[np.float64], older: Examples) -> _Floats:
    """The body and the head that older examples make for it, flat, as `whole(spec)` has them.

    The public head itself where there are none. Not finite where the body leads to no number.
    """
    head, model = _head(spec), whole(spec)
    at, size = np.append(body, _public_head(model)[len(body) :]), len(body)
    if len(older.y):
        with np.errstate(all="ignore"):
            for _ in range(head.steps):
                at[size:] -= head.rate * gradient(model, at, older)[size:]
    return at


def body_change(spec: TrainSpec, body: NDArray[np.float64], examples: Examples) -> _Floats:
    """What `spec.work` changes in the body, the head made of the older examples and then held.

    Of the newer examples alone, as those are what a prediction is for. Shape (parameters,).
    """
    older, newer = older_and_newer(spec, examples)
    at, size, model = reconstructed(spec, body, older), len(body), whole(spec)
    with np.errstate(all="ignore"):
        for _ in range(spec.work.epochs):
            at[:size] -= spec.work.rate * gradient(model, at, newer)[:size]
        return np.asarray(at[:size] - body)


def predict_newer(
    spec: TrainSpec, body: NDArray[np.float64], examples: Examples
) -> tuple[Examples, _Floats]:
    """One person's newer examples and what is predicted for them, as `models.predict` says it.

    Labels of older examples make the head; none of the newer does.
    """
    older, newer = older_and_newer(spec, examples)
    weights = reconstructed(spec, body, older)
    return newer, predict(whole(spec), weights, newer.x)


@lru_cache(maxsize=64)
def _public_head(model: TrainSpec) -> _Floats:
    start = initial(model, seed=_SEED)
    start.setflags(write=False)
    return start


def _head(spec: TrainSpec) -> PersonalHead:
    if spec.personal is None:
        raise ValueError(f"{spec.name}: expected a specification with a personal head.")
    return spec.personal


def head_size(spec: TrainSpec) -> int:
    """How many weights stay on the device."""
    return parameters(whole(spec)) - parameters(spec)
