"""The work on which simulators are compared, in NumPy only: peers read this in venvs of their own.

A cohort of 100 devices, 120 rows each; a network of 12 inputs, 16 tanh units and one output (225
parameters); one epoch of full-batch gradient descent on the log loss on each device; updates
clipped in L2, summed up with Gaussian noise, and their mean added to the weights. All 100 in every
round, so that whoever does the same work ends at the same weights, but for noise and precision.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COHORT = 100
ROWS = 120
INPUTS = 12
UNITS = 16
PARAMETERS = (INPUTS + 1) * UNITS + UNITS + 1
RATE = 2.0
CLIP = 0.5
#: Of the noise, in units of the clip: small, so that weights can be compared.
MULTIPLIER = 0.01

type Floats = NDArray[np.float64]


def people(count: int) -> tuple[Floats, Floats]:
    """Rows (count, ROWS, INPUTS) and labels 0 or 1 (count, ROWS), the same on every machine."""
    random = np.random.default_rng(1)
    x = random.uniform(-1, 1, (count, ROWS, INPUTS))
    logits = 4 * x[..., 0] - 3 * x[..., 1] * x[..., 2] + 1
    return x, (random.random((count, ROWS)) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def first_weights() -> list[Floats]:
    """Matrix and biases of each layer, outputs by inputs, as torch has them."""
    random = np.random.default_rng(2)
    hidden, output = (
        random.uniform(-0.5, 0.5, (UNITS, INPUTS)),
        random.uniform(-0.5, 0.5, (1, UNITS)),
    )
    return [hidden, np.zeros(UNITS), output, np.zeros(1)]
