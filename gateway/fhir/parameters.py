"""Which elements a search parameter looks into, so that nobody tests what he may not see.

Source: the search parameters of FHIR R4 (`gateway.fhir.definitions`). A parameter that an app adds
is not known and may test anything.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Final

from gateway.fhir.definitions import parameters_of

#: Parameters that look into everything, the narrative included, or whose meaning the app defines.
TEST_EVERYTHING: Final = frozenset({"_text", "_content", "_filter", "_query", "_list"})


def elements_tested(resource_type: str, parameter: str) -> frozenset[str] | None:
    """Paths (`Observation.value`) that a search parameter tests; None: it may test anything.

    A modifier (`code:text`) changes nothing here. A chain (`subject.name`) and `_has` are not
    known: whoever takes them apart asks for each part.
    """
    name = parameter.partition(":")[0]
    found = parameters_of(resource_type).get(name)
    if found is not None:
        return found
    common = parameters_of("Resource").get(name)
    if common is None:
        return None
    return frozenset(f"{resource_type}{path.removeprefix('Resource')}" for path in common)


def parameters_testing(resource_type: str, paths: Collection[str]) -> frozenset[str]:
    """Known search parameters of a type that test any of these elements, or a part of one.

    With any path, also those that test everything. Parameters for which `elements_tested` says None
    are not among them and must be refused by whoever asks.
    """
    own = frozenset(path for path in paths if path.startswith(f"{resource_type}."))
    return _testing(resource_type, own) if own else frozenset()


# What is hidden depends on rules and configuration: a few sets that come with every search.
@lru_cache(maxsize=1024)
def _testing(resource_type: str, own: frozenset[str]) -> frozenset[str]:
    names = {*parameters_of(resource_type), *parameters_of("Resource")}
    return TEST_EVERYTHING | {
        name
        for name in names
        if any(
            overlap(tested, path)
            for tested in elements_tested(resource_type, name) or ()
            for path in own
        )
    }


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other or leads to a part of it. A choice includes its kinds.

    `Observation.value` and `Observation.valueString` overlap. So do a few elements whose names
    only begin alike: too much is hidden then, never too little.
    """
    short, long = sorted((one.split("."), other.split(".")), key=len)
    return all(_same(a, b) for a, b in zip(short, long[: len(short)], strict=True))


def _same(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return long.startswith(short) and (len(short) == len(long) or long[len(short)].isupper())
