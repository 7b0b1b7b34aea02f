"""What FHIR R4 defines: elements, search parameters, the Patient compartment. Tables, no logic.

The tables in `data/` are HL7's published definitions (4.0.1, CC0), written by
`scripts/fhir_tables.py`. The compartment also has Task, which R5 added to it. Read once, at first
use.

An element is written `name*!?:kind|kind`: `*` may repeat, `!` is mandatory, `?` changes the meaning
of the rest; `name[x]` is a choice. The kind of an element with elements of its own is its path
(`Patient.contact`), also where the definition refers to one further up.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple, cast

import orjson

_WRITTEN: Final = re.compile(r"([A-Za-z0-9]+)(\[x\])?(\*)?(!)?(\?)?:(.+)").fullmatch

#: Primitive kinds in which any text may stand (FHIR R4 section 2.24.0.1).
TEXTS: Final = frozenset({"string", "markdown"})


# A tuple, not a dataclass: thousands are made when the tables are read.
class Element(NamedTuple):
    """One element of a type. `kinds` are several for a choice only."""

    name: str
    kinds: tuple[str, ...]
    choice: bool
    required: bool
    modifier: bool

    def json_names(self) -> tuple[tuple[str, str], ...]:
        """The names under which it may stand in JSON, each with its kind."""
        if not self.choice:
            return ((self.name, self.kinds[0]),)
        return tuple((f"{self.name}{kind[0].upper()}{kind[1:]}", kind) for kind in self.kinds)


def elements_of(kind: str) -> dict[str, Element]:
    """The elements of a type by name (a choice without `[x]`). Empty for what is not defined."""
    return _elements(kind) if kind in _table("elements", "types") else {}


def parameters_of(resource_type: str) -> dict[str, frozenset[str]]:
    """Search parameters of a type, each with the paths that it tests."""
    known = resource_type in _table("search", "parameters")
    return _parameters(resource_type) if known else {}


def compartment_of(resource_type: str) -> tuple[str, ...]:
    """Paths whose references put a resource of this type into a patient's compartment."""
    known = resource_type in _table("compartment", "patient")
    return _compartment(resource_type) if known else ()


def is_resource_type(name: str) -> bool:
    """Whether FHIR R4 defines a resource of this name."""
    return "implicitRules" in elements_of(name)


@cache
def resource_types() -> frozenset[str]:
    """All resource types of FHIR R4."""
    return frozenset(name for name in _table("elements", "types") if is_resource_type(name))


def is_primitive(kind: str) -> bool:
    """Whether a value of this kind is a JSON string, number or boolean."""
    return kind[:1].islower()


# Only names that are in the tables are remembered: those of a request are without end.
@cache
def _elements(kind: str) -> dict[str, Element]:
    parsed = [_parse(written) for written in _table("elements", "types")[kind].split()]
    return {element.name: element for element in parsed}


@cache
def _parameters(resource_type: str) -> dict[str, frozenset[str]]:
    written = _table("search", "parameters")[resource_type].split()
    pairs = (one.split("=") for one in written)
    return {name: frozenset(paths.split("|")) for name, paths in pairs}


@cache
def _compartment(resource_type: str) -> tuple[str, ...]:
    return tuple(_table("compartment", "patient")[resource_type].split())


def _parse(written: str) -> Element:
    parts = _WRITTEN(written)
    if parts is None:
        raise ValueError(f"expected an element in the form of the tables, found “{written}”")
    name, choice, _, required, modifier, kinds = parts.groups()
    return Element(name, tuple(kinds.split("|")), bool(choice), bool(required), bool(modifier))


@cache
def _table(file: str, section: str) -> dict[str, str]:
    raw = files("gateway.fhir").joinpath("data", f"{file}.json").read_bytes()
    return cast("dict[str, str]", orjson.loads(raw)[section])
