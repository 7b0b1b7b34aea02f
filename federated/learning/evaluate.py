"""How good a model is on people who were never trained on, as one bounded question of each person.

A class: each example puts its mass on a scale of scores, apart for both classes; from the sums come
AUC, calibration and Brier score, overall and by subgroup. A number: clipped absolute errors, of the
model and beside them by how much the person's own mean and last value do worse. Unit: the person.
A person with many examples shares out one unit of mass among them; the rest is `Layout`'s proof, so
sensitivity holds whatever weights and rows say.

The vector is made here; what the sums say is read off them in `ranking` and `accuracy`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import SMALLEST_COHORT, Asked, BaseQuery, OneRelease, too_few
from federated.analytics.bernstein import Moments, basis
from federated.analytics.counts import bin_of
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.means import typical_sums
from federated.analytics.quantity import Quantity, is_bin_edges
from federated.errors import ManifestError
from federated.learning.accuracy import Accuracy
from federated.learning.at_site import verify_torch
from federated.learning.examples import examples_of, history_of
from federated.learning.models import parameters, predict
from federated.learning.personal import predict_newer
from federated.learning.ranking import Ranking, knots
from federated.learning.round_query import given_numbers
from federated.learning.spec import MAX_EXAMPLES, Examples, TrainSpec
from federated.learning.split import is_held_out
from federated.model import Estimate, PersonRows, Sensitivity

_MOST_BINS: Final = 128
_MOST_SUBGROUPS: Final = 6
_MOST_GROUPS: Final = 16
_DEGREE: Final = 2
_CLASSES: Final = 2

type _Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgroup:
    """A way to tell people apart for fairness: bins of the newest known value of a column.

    Each bin reaches from its edge up to below the next, the last closes; what is beyond the outer
    edges is in the outer bins. For codes, as of sex, edges between them: -0.5, 0.5, 1.5.
    """

    column: str
    edges: tuple[float, ...]

    @property
    def quantity(self) -> Quantity:
        """The column as a question sees it."""
        return Quantity(column=self.column, low=self.edges[0], high=self.edges[-1], summary="last")

    @property
    def count(self) -> int:
        """How many groups."""
        return len(self.edges) - 1

    def names(self) -> tuple[str, ...]:
        """The groups, as an answer calls them."""
        pairs = zip(self.edges, self.edges[1:], strict=False)
        return tuple(f"{self.column} {low:g} to {high:g}" for low, high in pairs)

    def group_of(self, rows: PersonRows) -> int | None:
        """The person's group, or none where the column was never known."""
        scaled = self.quantity.of(rows)
        return None if scaled is None else bin_of(self.quantity, scaled, self.edges)

    def check(self, name: str) -> None:
        """Raises `ManifestError` for edges that are not ascending, or too many."""
        if not is_bin_edges(self.edges) or self.count > _MOST_GROUPS:
            raise ManifestError(
                f"{name}: edges of {self.column} must be 2 to {_MOST_GROUPS + 1} finite ascending "
                "numbers."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateQuery(OneRelease):
    """What is asked of held-out people, whatever the weights: a `model.Query`.

    `called` is its name in a study, `spec.name` that of the training whose weights are judged.
    `bins`: how finely scores are told apart (for a class). `examples`: with so many a person counts
    fully, with fewer in proportion: 1 lets every person count the same; as many as anybody has
    lets every example. `largest_error`, in the label's unit, is what a larger one counts as (for a
    number; the whole range if not given).
    """

    spec: TrainSpec
    bins: int = 32
    subgroups: tuple[Subgroup, ...] = ()
    examples: int = 1
    largest_error: float | None = None
    called: str = ""

    @property
    def name(self) -> str:
        """As declared, or after the training."""
        return self.called or f"{self.spec.name}-evaluation"

    @property
    def columns(self) -> frozenset[str]:
        """The model's and the subgroups'."""
        return self.spec.columns | {one.column for one in self.subgroups}

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed."""
        return self.unweighted.dimension

    @property
    def rounds(self) -> int:
        """One answers it."""
        return 1

    @property
    def sensitivity(self) -> Sensitivity:
        """Of the integer vector: see `Layout`; the weights change nothing of it."""
        return self.unweighted.sensitivity

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector."""
        return self.unweighted.bound

    @property
    def minimum_cohort(self) -> int:
        """People who must take part so that enough of them are held out for an interval."""
        return math.ceil(SMALLEST_COHORT / self.spec.held_out)

    @property
    def unweighted(self) -> EvaluateRound:
        """The question for weights that say nothing: as good as any to plan with."""
        return self.at(np.zeros(parameters(self.spec)))

    def verify_here(self) -> None:
        """As `model.Query`: networks need torch."""
        if self.spec.kind in {"mlp", "gru"}:
            verify_torch()

    def begin(self, given: bytes, *, index: int = 0) -> EvaluateRound:  # noqa: ARG002 - the protocol's
        """As `model.Query`: `given` are the weights."""
        return self.at(given_numbers(given, parameters(self.spec)))

    def give(self, weights: NDArray[np.float64]) -> bytes:
        """What `begin` reads."""
        return weights.astype("<f8").tobytes()

    def at(self, weights: NDArray[np.float64]) -> EvaluateRound:
        """The question for these weights. Raises `ManifestError` if it cannot be asked."""
        kind = EvaluateClass if self.spec.label.is_class else EvaluateNumber
        return kind(
            name=self.name,
            asked=self,
            weights=np.array(weights, dtype=np.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRound(BaseQuery):
    """A `model.Statistic`: blocks for all people, then one for each way to group them."""

    asked: EvaluateQuery
    weights: NDArray[np.float64] = field(repr=False, compare=False)

    def check(self) -> None:
        """Refuse what no block or interval is made for."""
        asked = self.asked
        if not 2 <= asked.bins <= _MOST_BINS or not 1 <= asked.examples <= MAX_EXAMPLES:  # noqa: PLR2004 - two bins are the fewest that rank anything
            raise ManifestError(
                f"{self.name}: `bins` is 2 to {_MOST_BINS}, `examples` 1 to {MAX_EXAMPLES}."
            )
        if len(asked.subgroups) > _MOST_SUBGROUPS:
            raise ManifestError(f"{self.name}: at most {_MOST_SUBGROUPS} ways to group people.")
        for subgroup in asked.subgroups:
            subgroup.check(self.name)
        largest, label = asked.largest_error, asked.spec.label
        if largest is not None and not 0 < largest <= label.high - label.low:
            raise ManifestError(
                f"{self.name}: `largest_error` is above 0 and at most the label's range."
            )

    @property
    def columns(self) -> frozenset[str]:
        """The model's and the subgroups'."""
        return self.asked.columns

    @property
    @abstractmethod
    def width(self) -> int:
        """Coordinates of the model's own block, and of each group's."""

    @property
    @abstractmethod
    def beside(self) -> int:
        """How many more blocks of the same size stand beside it."""

    @abstractmethod
    def shares(self, examples: Examples, scores: _Floats, rows: PersonRows) -> tuple[_Floats, ...]:
        """What a person says in each of the `1 + beside` blocks, each adding up to 1 at most."""

    def asks(self, *, study: str, tag: str) -> bool:
        """As `model.Contribution`: those who are kept for evaluation."""
        return is_held_out(study=study, tag=tag, fraction=self.asked.spec.held_out)

    @property
    def layout(self) -> Layout:
        """Every block holds one unit of mass of a person at most."""
        blocks = [Block(size=self.width, limit=FINE)] * (1 + self.beside)
        blocks += [Block(size=one.count * self.width, limit=FINE) for one in self.asked.subgroups]
        return Layout(blocks=tuple(blocks), unit=FINE)

    def masses(self, rows: PersonRows) -> _Floats:
        """Zeros for who has no example, and where the weights say no number."""
        spec = self.asked.spec
        examples = examples_of(spec, rows)
        masses = np.zeros(self.dimension)
        if not len(examples.y) or self.weights.shape != (parameters(spec),):
            return masses
        if spec.personal is None:
            scores = predict(spec, self.weights, examples.x)
        else:
            # The older labels made the head: only the newer are predictions.
            examples, scores = predict_newer(spec, self.weights, examples)
        if not np.isfinite(scores).all():
            return masses
        weight = min(1.0, len(examples.y) / self.asked.examples)
        blocks = [weight * block for block in self.shares(examples, scores, rows)]
        own = blocks[0]
        for subgroup in self.asked.subgroups:
            block = np.zeros((subgroup.count, self.width))
            group = subgroup.group_of(rows)
            if group is not None:
                block[group] = own
            blocks.append(block.reshape(-1))
        return np.concatenate(blocks)

    def by_group(self, asked: Asked) -> list[tuple[str, _Floats]]:
        """The name of each group and its part of the noisy sums."""
        found = []
        start = (1 + self.beside) * self.width
        for subgroup in self.asked.subgroups:
            end = start + subgroup.count * self.width
            parts = asked.masses[start:end].reshape(subgroup.count, self.width)
            found += list(zip(subgroup.names(), parts, strict=True))
            start = end
        return found

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        grouped = (
            (
                "A subgroup too small for the noise gets an interval of the whole range.",
                "Who has no value to be grouped by is in no subgroup.",
            )
            if self.asked.subgroups
            else ()
        )
        share = f"{100 * self.asked.spec.held_out:.3g} %"
        return (
            f"Of the people counted about {share} were asked, those held out; others added zeros.",
            "It holds for people like those who were asked, if they were not trained on.",
            *self.own_cautions(),
            *grouped,
        )

    @abstractmethod
    def own_cautions(self) -> tuple[str, ...]:
        """What this kind of label adds."""

    def typical(self, people: int) -> _Floats:
        """Groups of equal size. Of `people` only the share that is held out is asked."""
        people = round(people * self.asked.spec.held_out)
        own = self.typical_block(people)
        grouped = [np.tile(own / one.count, one.count) for one in self.asked.subgroups]
        return np.concatenate([*self.typical_beside(people), *grouped])

    @abstractmethod
    def typical_block(self, people: int) -> _Floats:
        """The model's own block of an unremarkable cohort."""

    @abstractmethod
    def typical_beside(self, people: int) -> tuple[_Floats, ...]:
        """All blocks that are not of a subgroup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateClass(EvaluateRound):
    """AUC, calibration, Brier score. A block: masses by class (0, then 1) and knot of scores."""

    @property
    def width(self) -> int:
        """Both classes at each knot."""
        return _CLASSES * (self.asked.bins + 1)

    @property
    def beside(self) -> int:
        """Nothing stands beside it."""
        return 0

    def shares(
        self,
        examples: Examples,
        scores: _Floats,
        rows: PersonRows,  # noqa: ARG002 - a number's own past is in them
    ) -> tuple[_Floats, ...]:
        """Each example's share lies on the two knots around its score: its mean is exact."""
        at = knots(self.asked.bins)
        place = np.clip(np.searchsorted(at, scores, side="right") - 1, 0, self.asked.bins - 1)
        above = (scores - at[place]) / (at[place + 1] - at[place])
        block = np.zeros((_CLASSES, self.asked.bins + 1))
        label = examples.y.astype(np.int64)
        share = 1 / len(scores)
        np.add.at(block, (label, place), share * (1 - above))
        np.add.at(block, (label, place + 1), share * above)
        return (block.reshape(-1),)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Overall, then AUC and calibration of each subgroup."""
        whole = Ranking(sums=asked.masses[: self.width], noise=asked.noise)
        if not whole.usable:
            raise too_few(self.name, "examples of both classes")
        found = [
            whole.auc("AUC", asked.level),
            whole.calibration("predicted minus observed", asked.level),
            whole.brier("Brier score", asked.level),
            whole.rate("observed rate", asked.level),
            *whole.reliability(asked.level),
        ]
        for name, part in self.by_group(asked):
            ranking = Ranking(sums=part, noise=asked.noise)
            found += [
                ranking.auc(f"AUC, {name}", asked.level),
                ranking.calibration(f"predicted minus observed, {name}", asked.level),
            ]
        return found

    def own_cautions(self) -> tuple[str, ...]:
        """What knots do."""
        return (
            (
                f"Scores are told apart at {self.asked.bins} steps: with few, AUC is drawn a "
                "little towards 0.5, and the Brier score is a little too high."
            ),
            "Where a person has many examples, intervals are wider than they would have to be.",
        )

    def typical_block(self, people: int) -> _Floats:
        """One in five, found with an AUC of about 0.8."""
        at = knots(self.asked.bins)
        zeros, ones = at**0.5 * (1 - at) ** 5 + 1e-9, at**1.5 * (1 - at) ** 2 + 1e-9
        return np.concatenate(
            [0.8 * people * zeros / zeros.sum(), 0.2 * people * ones / ones.sum()]
        )

    def typical_beside(self, people: int) -> tuple[_Floats, ...]:
        """The model's own."""
        return (self.typical_block(people),)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateNumber(EvaluateRound):
    """Mean absolute error, and by how much the person's own past does worse.

    Blocks of a Bernstein basis of degree 2, each at one number of the person from 0 to 1: their
    mean clipped error; and for own mean and last value the mean difference of clipped errors, past
    minus model, moved to 0 … 1. Differences within a person are what a comparison needs: who is
    hard to predict is so for both. Examples without a past count for the model alone.
    """

    @property
    def width(self) -> int:
        """Of the basis."""
        return _DEGREE + 1

    @property
    def beside(self) -> int:
        """Own mean and last value, where there is a past."""
        return 2 if self.asked.spec.per == "day" else 0

    @property
    def largest(self) -> float:
        """The error, in the label's unit, that larger ones count as."""
        label = self.asked.spec.label
        return self.asked.largest_error or label.high - label.low

    def shares(self, examples: Examples, scores: _Floats, rows: PersonRows) -> tuple[_Floats, ...]:
        """The basis at the person's numbers; nothing in a block that has none."""
        errors = self._errors(scores, examples.y)
        blocks = [basis(float(errors.mean()), _DEGREE)]
        if self.beside:
            past = history_of(self.asked.spec, rows)
            for whole in (past.mean, past.last):
                guess = whole[-len(errors) :]
                known = ~np.isnan(guess)
                if known.any():
                    worse = self._errors(guess[known], examples.y[known]) - errors[known]
                    blocks.append(basis((1 + float(worse.mean())) / 2, _DEGREE))
                else:
                    blocks.append(np.zeros(_DEGREE + 1))
        return tuple(blocks)

    def _errors(self, scores: _Floats, truth: _Floats) -> _Floats:
        """Absolute errors as shares of `largest`, 0 … 1."""
        label = self.asked.spec.label
        off = np.abs(np.clip(scores, -1.0, 1.0) - truth) * (label.high - label.low) / 2
        return np.minimum(off / self.largest, 1.0)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """The model's error, then the own past's and by how much it is larger; then subgroups."""
        accuracy = Accuracy(noise=asked.noise, largest=self.largest, unit=self.unit)
        blocks = asked.masses[: (1 + self.beside) * self.width].reshape(-1, self.width)
        own = Moments(sums=blocks[0])
        if not own.usable(asked.noise):
            raise too_few(self.name, "examples")
        found = [accuracy.error("MAE", own, asked.level)]
        for name, block in zip(("own mean", "last value"), blocks[1:], strict=False):
            found += accuracy.past(name, own, Moments(sums=block), asked.level)
        return found + [
            accuracy.error(f"MAE, {name}", Moments(sums=part), asked.level)
            for name, part in self.by_group(asked)
        ]

    @property
    def unit(self) -> str:
        """Errors are in the label's own unit."""
        return f"as {self.asked.spec.label.column}"

    def own_cautions(self) -> tuple[str, ...]:
        """What clipping does."""
        return (f"An error above {self.largest:g} counts as {self.largest:g}.",)

    def typical_block(self, people: int) -> _Floats:
        """Errors in the lower middle of the range."""
        return typical_sums(people, _DEGREE)

    def typical_beside(self, people: int) -> tuple[_Floats, ...]:
        """The same spread of differences."""
        return (typical_sums(people, _DEGREE),) * (1 + self.beside)
