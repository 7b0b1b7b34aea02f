"""People out of a public table: the importer's own reading, refused whole where a row is bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from federated.errors import ImportDataError
from federated.research import people_of

MAPPING = """
source = "made up"
delimiter = ","
person = "who"
[day]
column = "day"
[columns.mood]
take = ["mood"]
unit = "{score}"
[columns.sleep_hours]
take = ["slept"]
unit = "h"
"""


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    path = tmp_path / "mapping.toml"
    path.write_text(MAPPING, encoding="utf-8")
    return path


def table(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "people.csv"
    path.write_text("\n".join(["who,day,mood,slept", *rows]) + "\n", encoding="utf-8")
    return path


def test_reads_each_person_as_a_device_would(tmp_path: Path, mapping: Path) -> None:
    path = table(tmp_path, "a,2026-01-01,1,7", "b,2026-01-01,,8", "a,2026-01-02,2,6")
    one, other = people_of(path, mapping=mapping, columns=["mood", "sleep_hours"])
    assert one.values["mood"].tolist() == [1, 2]
    assert np.diff(one.days).tolist() == [1]
    assert other.values["sleep_hours"].tolist() == [8]
    (known,) = people_of(path, mapping=mapping, columns=["sleep_hours"], having="mood")
    assert known.values["sleep_hours"].tolist() == [7, 6]


def test_refuses_a_bad_row_by_its_line_and_says_no_value(tmp_path: Path, mapping: Path) -> None:
    path = table(tmp_path, "a,2026-01-01,1,7", "a,2026-01-02,1,4711")
    with pytest.raises(ImportDataError, match="line 3") as error:
        people_of(path, mapping=mapping, columns=["sleep_hours"])
    assert "4711" not in str(error.value)


def test_refuses_an_unknown_column_and_a_file_that_is_not_there(
    tmp_path: Path, mapping: Path
) -> None:
    path = table(tmp_path, "a,2026-01-01,1,7")
    with pytest.raises(ImportDataError):
        people_of(path, mapping=mapping, columns=["slept"])
    with pytest.raises(ImportDataError):
        people_of(tmp_path / "nothing.csv", mapping=mapping, columns=["mood"])
