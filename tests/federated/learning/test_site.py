"""Training at a site: one person is one example, and only that makes a claim."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.errors import AccountingError, ManifestError
from federated.learning import site
from federated.learning.baselines import (
    centralised,
    centralised_dp_sgd,
    each_alone,
    each_alone_private,
    scored,
)
from federated.learning.examples import examples_of
from federated.learning.export import to_onnx, to_safetensors
from federated.learning.models import parameters, predict
from federated.learning.site import (
    PersonLevel,
    RecordLevel,
    SiteTraining,
    provenance,
    train_people,
    train_records,
)
from federated.learning.spec import TrainSpec, Work
from federated.model import PersonRows
from tests.federated.learning.people import PACO, folds, paco
from tests.federated.learning.samples import SPECS, made_up, weights_for
from tests.federated.learning.test_baselines import SPEC, people
from tests.federated.learning.test_clipped import cancelling, looped, summed

TRAINING = SiteTraining(
    spec=SPEC, clip=0.5, rate=0.25, steps=20, divisor=25.0, multiplier=1.0, step_size=2.0
)
type _Floats = NDArray[np.float64]


def bits(seed: int = 1) -> SeededBits:
    return SeededBits(bytes([seed]) * 32, b"test")


class Chosen:
    """Stands for the clipping: notes whom it is asked for, says one fixed sum."""

    def __init__(self, said: float) -> None:
        self.said, self.counts = said, list[int]()

    def __call__(self, spec: TrainSpec) -> Chosen:
        return self

    def clipped_sum(
        self, weights: _Floats, people: object, *, clip: float, fineness: float,
        drawn: NDArray[np.bool_],
    ) -> NDArray[np.int64]:  # fmt: skip
        self.counts.append(int(drawn.sum()))
        return np.full(len(weights), round(self.said * fineness / clip), dtype=np.int64)


def without_noise(count: int, **_: object) -> NDArray[np.int64]:
    return np.zeros(count, dtype=np.int64)


def test_each_person_is_drawn_by_themselves_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Chosen(0.0)
    monkeypatch.setattr("federated.learning.clipped.Clipper", chosen)
    train_people(replace(TRAINING, steps=2000, multiplier=1e-3), people(40, 1), random=bits())
    counts = np.array(chosen.counts)
    # Binomial(40, 1/4): mean 10, variance 7.5; a fixed batch would have none.
    assert counts.mean() == pytest.approx(10, abs=0.3)
    assert counts.var() == pytest.approx(7.5, rel=0.15)


def test_everybody_is_in_every_step_at_a_rate_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Chosen(0.0)
    monkeypatch.setattr("federated.learning.clipped.Clipper", chosen)
    train_people(replace(TRAINING, rate=1.0), people(7, 1), random=bits())
    assert chosen.counts == [7] * 20


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_divisor_is_the_callers_whoever_is_drawn(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """floor(rate · people) is 0 for one person, and tells one person from two for few."""
    monkeypatch.setattr("federated.learning.clipped.Clipper", Chosen(0.5))
    monkeypatch.setattr(site, "sample", without_noise)
    spec = replace(SPEC, work=Work(l2=0.0))
    found = train_people(
        replace(TRAINING, spec=spec, steps=4), people(count, 1), random=bits()
    ).weights
    assert found == pytest.approx(np.full(3, -2.0 * 4 * 0.5 / 25.0), abs=1e-12)


def test_a_step_with_nobody_still_adds_noise() -> None:
    nobody = train_people(TRAINING, [], random=bits()).weights
    assert (nobody != 0).all()
    rare = replace(TRAINING, rate=1e-18)
    assert (train_people(rare, people(5, 1), random=bits()).weights != 0).all()


def test_the_noise_is_that_of_the_multiplier() -> None:
    """Nobody's data, one step: weights are noise · clip · multiplier / divisor alone."""
    one = replace(TRAINING, spec=replace(SPEC, work=Work(l2=0.0)), steps=1, multiplier=1.5)
    random = bits()
    drawn = np.concatenate([train_people(one, [], random=random).weights for _ in range(1500)])
    assert drawn.std() == pytest.approx(2.0 * 1.5 * 0.5 / 25.0, rel=0.05)
    assert abs(drawn.mean()) < 4 * drawn.std() / np.sqrt(len(drawn))


def test_steps_are_those_of_a_plain_loop_plus_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decay stands outside the clip, since it is nobody's."""
    monkeypatch.setattr(site, "sample", without_noise)
    spec = replace(SPEC, work=Work(l2=0.1))
    everybody = people(12, 2)
    given = [examples_of(spec, rows) for rows in everybody]
    expected, bare = np.zeros(3), replace(spec, work=Work())
    for _ in range(5):
        total = looped(bare, expected, given, norm=0.5)
        expected = expected - 2.0 * (total / 12 + 0.1 * np.append(expected[:-1], 0))
    training = replace(TRAINING, spec=spec, rate=1.0, steps=5, divisor=12.0)
    assert train_people(training, everybody, random=bits()).weights == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("size", [0.5, 30.0, 1000.0])
def test_no_person_moves_a_steps_sum_beyond_the_sensitivity(spec: TrainSpec, size: float) -> None:
    training = SiteTraining(spec=spec, clip=0.01, rate=1.0, steps=1, divisor=1.0, multiplier=1.0)
    weights = np.clip(weights_for(parameters(spec), 1, size), -1000, 1000)
    everybody = [made_up(spec, seed, count=1 + seed % 9) for seed in range(30)]
    everybody.append(cancelling(everybody[0], spec))
    whole = summed(spec, weights, everybody, norm=training.clip)
    moved = []
    for person in range(len(everybody)):
        drawn = np.ones(len(everybody), dtype=bool)
        drawn[person] = False
        rest = summed(spec, weights, everybody, norm=training.clip, drawn=drawn)
        moved.append(float(np.linalg.norm(whole - rest)))
    assert max(moved) <= site._FINENESS + np.sqrt(len(weights)) / 2 < training.sensitivity.l2
    assert max(moved) > 0.9 * site._FINENESS


def test_rows_that_are_none_make_no_example_and_leave_others_theirs() -> None:
    """Else one person's rows would make zeros of everybody's answer, without any noise."""
    everybody = people(12, 1)
    bad = PersonRows(days=np.arange(3), values={name: np.zeros(2) for name in SPEC.columns})
    nobody = PersonRows(days=np.empty(0, np.int64), values={})
    first, second = (
        train_people(replace(TRAINING, rate=1.0), [one, *everybody], random=bits()).weights
        for one in (bad, nobody)
    )
    with pytest.raises(ValueError, match="shape"):
        examples_of(SPEC, bad)
    assert np.array_equal(first, second)


def test_the_noise_planned_covers_the_whole_sensitivity() -> None:
    for spec in SPECS:
        training = replace(TRAINING, spec=spec, multiplier=1.3)
        assert Fraction(training.noise.scale) >= Fraction(1.3) * Fraction(training.sensitivity.l2)
        assert training.sensitivity.l2 < 1.0001 * site._FINENESS


def test_a_target_is_met_by_all_steps_together() -> None:
    found = TRAINING.calibrated(epsilon=2.0, delta=1e-5)
    assert 1.99 < found.epsilon(delta=1e-5) <= 2.0
    assert replace(found, steps=21).epsilon(delta=1e-5) > 2.0
    assert replace(found, rate=0.3).epsilon(delta=1e-5) > 2.0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_weights_are_a_model_like_any_other(spec: TrainSpec) -> None:
    rows = [
        PersonRows(
            days=np.arange(9),
            values={name: np.random.default_rng(seed).uniform(0, 7, 9) for name in spec.columns},
        )
        for seed in range(6)
    ]
    training = SiteTraining(
        spec=spec, clip=1.0, rate=0.5, steps=3, divisor=3.0, multiplier=2.0, averaged=2
    )
    model = train_people(training, rows, random=bits())
    x = examples_of(spec, rows[0]).x
    assert np.isfinite(predict(spec, model.weights, x)).all()
    said = provenance(model, study_hash="ab" * 32, delta=1e-5)
    assert said.epsilon == training.epsilon(delta=1e-5)
    assert to_onnx(spec, model.weights, said)
    assert to_safetensors(spec, model.weights, said)


def test_the_same_bits_give_the_same_weights() -> None:
    first, again = (train_people(TRAINING, people(30, 1), random=bits()) for _ in range(2))
    assert np.array_equal(first.weights, again.weights)
    other = train_people(TRAINING, people(30, 1), random=bits(2))
    assert not np.array_equal(first.weights, other.weights)


def test_protection_of_records_never_makes_a_claim_about_a_person() -> None:
    (rows,) = people(1, 3)
    record = train_records(TRAINING, rows, random=bits())
    assert (record.unit, PersonLevel.unit) == ("record", "person")
    with pytest.raises(AccountingError, match="about people"):
        provenance(record, study_hash="ab" * 32, delta=1e-5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        replace(record, unit="person")  # type: ignore[call-arg]
    with pytest.raises((AttributeError, TypeError)):
        record.unit = "person"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        record.epsilon(delta=1e-5)  # type: ignore[attr-defined]

    class Claims(RecordLevel):
        unit = "person"

    with pytest.raises(AccountingError, match="about people"):
        provenance(
            Claims(training=TRAINING, weights=record.weights),  # type: ignore[arg-type]
            study_hash="ab" * 32,
            delta=1e-5,
        )


def test_records_are_drawn_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten examples are ten units here, and one unit in `train_people`."""
    chosen = Chosen(0.0)
    monkeypatch.setattr("federated.learning.clipped.Clipper", chosen)
    (rows,) = people(1, 3)
    whole = replace(TRAINING, rate=1.0, steps=1)
    train_records(whole, rows, random=bits())
    train_people(whole, [rows], random=bits())
    assert chosen.counts == [10, 1]
    assert train_records(whole, rows, random=bits()).record_epsilon(delta=1e-5) > 0


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ManifestError, {"clip": 0.0}), (ManifestError, {"clip": np.nan}),
        (ManifestError, {"clip": 1e-165}), (ManifestError, {"clip": 1e300}),
        (ManifestError, {"divisor": 0.0}), (ManifestError, {"divisor": np.inf}),
        (ManifestError, {"step_size": -1.0}), (ManifestError, {"steps": 0}),
        (ManifestError, {"averaged": 21}), (ManifestError, {"averaged": 0}),
        (AccountingError, {"rate": 0.0}), (AccountingError, {"rate": 1.5}),
        (AccountingError, {"multiplier": 0.0}), (AccountingError, {"multiplier": np.nan}),
    ],
)  # fmt: skip
def test_refuses_a_training_that_cannot_be(
    error: type[Exception], changes: dict[str, object]
) -> None:
    with pytest.raises(error):
        replace(TRAINING, **changes)  # type: ignore[arg-type]


def test_stops_where_weights_run_away_without_naming_data() -> None:
    wild = replace(TRAINING, step_size=1e6)
    with pytest.raises(ManifestError, match="smaller `step_size`"):
        train_people(wild, people(5, 1), random=bits())


@pytest.mark.parametrize("start", [np.zeros(2), np.full(3, np.nan), np.full(3, 2000.0)])
def test_refuses_a_start_of_another_model_or_of_no_numbers(start: _Floats) -> None:
    with pytest.raises(ManifestError):
        train_people(TRAINING, people(5, 1), random=bits(), start=start)


def test_a_private_site_is_near_the_one_that_protects_nobody() -> None:
    train, held_out = people(400, 3), people(100, 4)
    best = scored(SPEC, centralised(SPEC, train, steps=200, rate=4.0), held_out).auc
    training = replace(TRAINING, steps=40, averaged=20, divisor=100.0)
    private = training.calibrated(epsilon=2.0, delta=1e-5)
    weights = centralised_dp_sgd(private, train, random=bits())
    assert scored(SPEC, weights, held_out).auc > best - 0.02
    lost = training.calibrated(epsilon=0.01, delta=1e-5)
    assert np.linalg.norm(centralised_dp_sgd(lost, train, random=bits())) > 5


def test_a_private_site_alone_knows_its_own_people_less_well_than_without_noise() -> None:
    sites = [
        (people(150, 5), people(60, 6)),
        (people(150, 7, flipped=True), people(60, 8, flipped=True)),
    ]
    private = replace(TRAINING, steps=40, averaged=20).calibrated(epsilon=2.0, delta=1e-4)
    alone = each_alone_private(private, sites, random=bits())
    open_ = each_alone(SPEC, sites, steps=100, rate=4.0)
    for ours, best in zip(alone, open_, strict=True):
        assert 0.75 < ours.auc < best.auc + 0.02


def test_dp_sgd_over_pacos_people_loses_little_at_one_epsilon() -> None:
    everybody, chosen = paco(), set(folds(562)[0].tolist())
    train = [rows for place, rows in enumerate(everybody) if place not in chosen]
    held_out = [everybody[place] for place in sorted(chosen)]
    training = SiteTraining(
        spec=PACO, clip=0.25, rate=0.25, steps=100, divisor=0.25 * len(train), multiplier=1.0,
        step_size=4.0, averaged=40,
    ).calibrated(epsilon=1.0, delta=1 / (10 * len(everybody)))  # fmt: skip
    model = train_people(training, train, random=bits())
    best = scored(PACO, centralised(PACO, train, steps=150, rate=2.0), held_out).auc
    assert scored(PACO, model.weights, held_out).auc > best - 0.02
