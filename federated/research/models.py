"""A trained model in a researcher's hands: predictions in its label's own unit, weights by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from federated.errors import ManifestError
from federated.learning.examples import examples_of
from federated.learning.models import predict
from federated.learning.round_query import TrainQuery
from federated.model import PersonRows
from federated.research.show import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A trained model. `weights` as `learning.models` orders them; ε at δ of all its rounds."""

    query: TrainQuery
    weights: NDArray[np.float64] = field(repr=False)
    epsilon: float
    delta: float

    def predict(self, given: PersonRows | NDArray[np.float64]) -> NDArray[np.float64]:
        """A probability for a class, a number in the label's own unit and bounds else.

        Of rows: one for each day on which a feature is known, oldest first, the newest `spec.most`;
        for a model of whole persons one in all. The label need not be known. Of an array: one for
        each row of features as `learning.examples` scales them, -1 to 1, what is unknown 0. Raises
        `ManifestError` for a model whose last layer never left the devices, or one that has its
        label's column as a feature, too: give that features.
        """
        spec = self.query.spec
        if spec.personal is not None:
            raise ManifestError(f"{self.query.name}: its last layer stays on each device.")
        x = self._features(given) if isinstance(given, PersonRows) else np.asarray(given)
        found = predict(spec, self.weights, x)
        if spec.label.is_class:
            return found
        low, high = spec.label.low, spec.label.high
        return np.asarray(low + (np.clip(found, -1, 1) + 1) / 2 * (high - low))

    @property
    def table(self) -> Table:
        """The weight of each feature, largest first, of a logistic or linear model."""
        spec = self.query.spec
        if spec.kind not in {"logistic", "linear"} or spec.personal is not None:
            raise ManifestError(f"{self.query.name}: the weights of this model say nothing singly.")
        named = zip([*self._inputs(), "(everybody)"], self.weights, strict=True)
        rows = sorted(named, key=lambda row: -abs(row[1]))
        return Table(
            title=f"{self.query.name}: weights",
            columns=("feature, from -1 to 1 within its bounds", "weight"),
            rows=tuple((name, f"{weight:+.2f}") for name, weight in rows),
            notes=("Weights hold noise, and features go together: they are no causes.",),
        )

    def _features(self, rows: PersonRows) -> NDArray[np.float64]:
        spec, label = self.query.spec, self.query.spec.label
        columns = {one.column for one in spec.features}
        if label.column in columns:
            raise ManifestError(f"{self.query.name}: {label.column} is label and feature.")
        known = np.zeros(len(rows.days), dtype=bool)
        for name in columns & rows.values.keys():
            known |= ~np.isnan(rows.values[name])
        # Days without a label are no examples; a made-up one changes no feature.
        values = {name: rows.values[name][known] for name in columns & rows.values.keys()}
        values[label.column] = np.full(int(known.sum()), label.low)
        asked = replace(spec, label=replace(label, ahead=0))
        return examples_of(asked, PersonRows(days=rows.days[known], values=values)).x

    def _inputs(self) -> list[str]:
        names = []
        for one in self.query.spec.features:
            name = f"{one.column} {one.low:g} to {one.high:g}"
            name += f", {one.lag} days before" if one.lag else ""
            name += ", less the own mean" if one.within else ""
            names += [name, f"{name}: known"] if one.indicator else [name]
        return names
