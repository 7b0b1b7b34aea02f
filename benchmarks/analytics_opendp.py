"""What OpenDP gives a trusted curator: the same statistics at the same ε, from the same numbers.

The curator holds every person's number in the clear and knows how many there are. Each answer is
made of OpenDP's own transformations and its Laplace mechanism; what needs several sums shares ε out
equally. Adjacency: one person's value replaced where the size is public (`d_in` 2), one person more
or less where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import opendp.prelude as dp
from numpy.typing import NDArray

dp.enable_features("contrib", "idealized-numerics")

type Floats = NDArray[np.float64]
type Draw = Callable[[], Floats]


def mean(values: Floats, low: float, high: float, epsilon: float) -> Draw:
    """Mean of clamped values of a public number of people."""
    domain = dp.vector_domain(dp.atom_domain(bounds=(low, high), nan=False), size=len(values))
    return _drawn(dp.t.make_mean(domain, dp.symmetric_distance()), values, 2, epsilon)


def variance(values: Floats, low: float, high: float, epsilon: float) -> Draw:
    """Variance of clamped values of a public number of people."""
    domain = dp.vector_domain(dp.atom_domain(bounds=(low, high), nan=False), size=len(values))
    return _drawn(dp.t.make_variance(domain, dp.symmetric_distance()), values, 2, epsilon)


def total(values: Floats, low: float, high: float, epsilon: float) -> Draw:
    """Sum of clamped values of a number of people that is not public."""
    domain = dp.vector_domain(dp.atom_domain(bounds=(low, high), nan=False))
    return _drawn(dp.t.make_sum(domain, dp.symmetric_distance()), values, 1, epsilon)


def centred_mean(values: NDArray[np.int64], middle: int, reach: int, epsilon: float) -> Draw:
    """Mean of whole numbers as a sum around the middle over a public number of people.

    The least noise that OpenDP can be made to give: half of what its mean has.
    """
    noisy = centred_total(values, middle, reach, epsilon)
    return lambda: middle + noisy() / len(values)


def centred_total(values: NDArray[np.int64], middle: int, reach: int, epsilon: float) -> Draw:
    """Sum of how far whole numbers are from the middle, over a number of people not public."""
    domain = dp.vector_domain(dp.atom_domain(bounds=(-reach, reach), T=int))
    summed = dp.t.make_sum(domain, dp.symmetric_distance())
    return _drawn(summed, np.clip(values - middle, -reach, reach), 1, epsilon)


def count(size: int, epsilon: float) -> Draw:
    """How many there are."""
    domain = dp.vector_domain(dp.atom_domain(T=int))
    return _drawn(dp.t.make_count(domain, dp.symmetric_distance()), np.zeros(size, int), 1, epsilon)


def counts(bins: NDArray[np.int64], size: int, epsilon: float) -> Draw:
    """How many there are in each of `size` bins."""
    return _drawn(_by_category(size), bins, 1, epsilon, kept=size)


def quantiles(
    bins: NDArray[np.int64], edges: Floats, alphas: Sequence[float], epsilon: float
) -> Draw:
    """Quantiles from OpenDP's tree of counts, with the branching that it advises."""
    leaves = len(edges) - 1
    branching = dp.t.choose_branching_factor(len(bins))
    tree = _by_category(leaves) >> dp.t.then_b_ary_tree(
        leaf_count=leaves, branching_factor=branching
    )
    noisy = _chain(tree, 1, epsilon)
    consistent = dp.t.make_consistent_b_ary_tree(branching_factor=branching)
    read = dp.t.make_quantiles_from_counts(edges.tolist(), alphas=list(alphas))
    given = bins.tolist()
    return lambda: np.array(read(consistent(noisy(given))))


def exponential_quantiles(
    values: Floats, edges: Floats, alphas: Sequence[float], epsilon: float
) -> Draw:
    """Each quantile by the exponential mechanism over the leaves' edges, ε shared out."""
    domain = dp.vector_domain(dp.atom_domain(T=float, nan=False))
    candidates = edges.tolist()

    def make(alpha: float) -> Any:
        def at(scale: float) -> Any:
            return dp.m.make_private_quantile(
                domain,
                dp.symmetric_distance(),
                dp.max_divergence(),
                candidates=candidates,
                alpha=alpha,
                scale=scale,
            )

        return dp.binary_search_chain(at, d_in=1, d_out=epsilon / len(alphas), T=float)

    made = [make(alpha) for alpha in alphas]
    given = values.tolist()
    return lambda: np.array([one(given) for one in made])


def together(combine: Callable[..., Floats | float], *parts: Draw) -> Draw:
    """An answer made of several noisy ones."""
    return lambda: np.atleast_1d(combine(*(part() for part in parts)))


def _by_category(size: int) -> Any:
    """Counts of bins 0 … size - 1; what is in none is counted last."""
    domain = dp.vector_domain(dp.atom_domain(T=int))
    return dp.t.make_count_by_categories(
        domain, dp.symmetric_distance(), categories=list(range(size - 1))
    )


def _chain(transformation: Any, d_in: int, epsilon: float) -> Any:
    return dp.binary_search_chain(
        lambda scale: transformation >> dp.m.then_laplace(scale), d_in=d_in, d_out=epsilon
    )


def _drawn(
    transformation: Any, values: NDArray[Any], d_in: int, epsilon: float, kept: int | None = None
) -> Draw:
    noisy = _chain(transformation, d_in, epsilon)
    given = values.tolist()
    return lambda: np.atleast_1d(np.asarray(noisy(given), dtype=np.float64))[:kept]
