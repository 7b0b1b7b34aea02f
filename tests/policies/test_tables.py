"""Code tables load whole or not at all, and a clinic can only add to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.errors import BundleError, PolicyConfigurationError
from policies.tables import BUILT_IN, load_tables

OWN = 'systems = ["http://clinic.example/notes"]\nmatch = "exact"\n[labels]\nPSYTHPN = ["NOTE-1"]\n'


def test_a_clinic_adds_its_own_codes(tmp_path: Path) -> None:
    (tmp_path / "notes.toml").write_text(OWN)
    tables = load_tables([tmp_path])
    assert tables.find("http://clinic.example/notes", "note-1") == {"PSYTHPN"}
    assert tables.find("http://hl7.org/fhir/sid/icd-10-cm", "B20") == {"HIV"}


def test_a_clinic_cannot_take_a_label_away(tmp_path: Path) -> None:
    text = OWN.replace("http://clinic.example/notes", "http://snomed.info/sct")
    (tmp_path / "snomed.toml").write_text(text.replace("NOTE-1", "86406008"))
    assert load_tables([tmp_path]).find("http://snomed.info/sct", "86406008") >= {"HIV", "PSYTHPN"}


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        OWN.replace("exact", "fuzzy"),
        OWN.replace("PSYTHPN", "PSYTPN"),
        OWN.replace("NOTE-1", " "),
        OWN + "more = 1\n",
        OWN.replace("systems", "system"),
    ],
)
def test_a_table_that_is_not_right_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(BundleError, match=r"own\.toml"):
        load_tables([tmp_path])


def test_a_folder_that_is_not_there_is_the_operators_to_mend(tmp_path: Path) -> None:
    with pytest.raises(PolicyConfigurationError, match="tables_directory"):
        load_tables([tmp_path / "nowhere"])


@pytest.mark.parametrize("file", sorted(BUILT_IN.glob("*.toml")), ids=lambda file: file.name)
def test_every_table_says_where_it_comes_from(file: Path) -> None:
    head = [line for line in file.read_text().splitlines()[:8] if line.startswith("#")]
    words = " ".join(head)
    assert any(
        word in words for word in ("Source", "published by", "belongs to", "trademark", "Ours")
    )
