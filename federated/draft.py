"""A study as a researcher writes it: a TOML file, and how gaps in it are filled.

Lives here: reading the file strictly (an unknown key is refused with the nearest right name), and
making a whole `Study` of it. What a study must hold to stands in `federated.manifest`. A draft may
leave to the planner what it computes (the noise and columns of each query), to the coordinator what
it knows (the roster), and to this installation its code hash; a whole study leaves out nothing.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from federated.errors import ManifestError
from federated.manifest import (
    MAX_MANIFEST_BYTES,
    Study,
    canonical_json,
    study_from_json,
)
from federated.model import NoisePlan, TrustModel

#: TOML has such keys without quotes.
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
DEFAULT_VALIDITY_DAYS: Final = 90
_DAY_S: Final = 86_400


class QuerySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[queries]]`: `ask` is the query itself, the rest is what its answer costs."""

    ask: dict[str, Any]
    epsilon: float
    delta: float = 0.0
    columns: tuple[str, ...] | None = None
    mechanism: str | None = None
    scale: float | None = None


class AggregationSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[aggregation]`: numbers of nodes, and the bits of the modulus."""

    threshold: int
    #: Whoever reads an answer and knows his own node's noise can take that off.
    colluding: int = 1
    minimum_survivors: int | None = None
    modulus_bits: int = 64


class StudyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    id: str
    title: str
    question: str
    purpose: str = "HRESCH"
    unit: str = "person"
    adjacency: str = "zero-out"
    trust_model: TrustModel = "secure_aggregation"
    #: Unix seconds, or a date or time with its offset in TOML.
    valid_from: Any
    valid_until: Any = None
    #: Of the whole study; the sum of the queries' if left out.
    epsilon: float | None = None
    delta: float | None = None
    rounds: int | None = None
    minimum_cohort: int
    sites: tuple[str, ...] = ()
    ethics_approvals: int = 1
    roster: str | None = None
    code_hash: str | None = None
    aggregation: AggregationSection
    queries: tuple[QuerySection, ...]
    run_config: dict[str, bool | int | float | str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the planner found for one query."""

    columns: frozenset[str]
    noise: NoisePlan


@dataclass(frozen=True, slots=True)
class Draft:
    """A study that may have gaps."""

    file: StudyFile

    def asking(self, asks: Sequence[Mapping[str, Any]]) -> Draft:
        """The same draft with these declarations in place of its own, in their order."""
        sections = zip(self.file.queries, asks, strict=True)
        queries = tuple(msgspec.structs.replace(one, ask=dict(ask)) for one, ask in sections)
        return Draft(msgspec.structs.replace(self.file, queries=queries))

    def complete(
        self,
        *,
        planned: Mapping[str, Planned] | None = None,
        roster: str | None = None,
        code_hash: str | None = None,
    ) -> Study:
        """Fill the gaps and make the study. What the file says itself is never replaced.

        `planned` is by the query's name. Raises `ManifestError`, which names what is missing.
        """
        file = self.file
        until = file.valid_until
        valid_from = _seconds("valid_from", file.valid_from)
        rules = file.aggregation
        survivors = rules.minimum_survivors
        queries = [_whole(query, planned or {}) for query in file.queries]
        given = {
            "version": 1,
            **{name: getattr(file, name) for name in _KEPT},
            "sites": sorted(file.sites),
            "run_config": file.run_config,
            "roster": _given("roster", file.roster or roster),
            "code_hash": _given("code_hash", file.code_hash or code_hash),
            "valid_from": valid_from,
            "valid_until": valid_from + DEFAULT_VALIDITY_DAYS * _DAY_S
            if until is None
            else _seconds("valid_until", until),
            "epsilon": _total(file.epsilon, [query.epsilon for query in file.queries]),
            "delta": _total(file.delta, [query.delta for query in file.queries]),
            "rounds": len(file.queries) if file.rounds is None else file.rounds,
            "columns": sorted({column for query in queries for column in query["columns"]}),
            "queries": queries,
            "aggregation": {
                "threshold": rules.threshold,
                "colluding": rules.colluding,
                "minimum_survivors": rules.threshold if survivors is None else survivors,
                "modulus_bits": rules.modulus_bits,
            },
        }
        return study_from_json(given)


_KEPT: Final = (
    "id", "title", "question", "purpose", "unit", "adjacency", "trust_model", "minimum_cohort",
    "ethics_approvals",
)  # fmt: skip


def _given(name: str, value: str | None) -> str:
    if value is None:
        raise ManifestError(f"The study does not say its `{name}`: `havengate study plan` adds it.")
    return value


def _total(given: float | None, parts: Sequence[float]) -> float:
    return float(sum(parts)) if given is None else given


def _seconds(name: str, value: object) -> int:
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise ManifestError(f"`{name}` needs an offset, as in 2026-01-31T08:00:00Z.")
        return int(value.timestamp())
    if isinstance(value, dt.date):
        midnight = dt.datetime.combine(value, dt.time(), tzinfo=dt.UTC)
        return int(midnight.timestamp())
    if type(value) is not int:
        raise ManifestError(f"`{name}` must be a date, or a time with its offset.")
    return value


def _whole(query: QuerySection, planned: Mapping[str, Planned]) -> dict[str, Any]:
    name = query.ask.get("name")
    found = planned.get(name) if isinstance(name, str) else None
    columns = query.columns
    if columns is None:
        if found is None:
            raise ManifestError(f"The query {name!r} does not say which `columns` it reads.")
        columns = tuple(found.columns)
    mechanism, scale = query.mechanism, query.scale
    if mechanism is None and scale is None and found is not None:
        mechanism, scale = found.noise.mechanism, found.noise.scale
    if mechanism is None or scale is None:
        raise ManifestError(
            f"The query {name!r} does not say the `mechanism` and `scale` of its noise: "
            "`havengate study plan` adds both."
        )
    return {
        "ask": query.ask,
        "columns": sorted(columns),
        "delta": query.delta,
        "epsilon": query.epsilon,
        "noise": {"mechanism": mechanism, "scale": scale},
    }


def parse_draft(toml: bytes) -> Draft:
    """Read the file. Raises `ManifestError`, one line for the first mistake."""
    if len(toml) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"The study's file has more than {MAX_MANIFEST_BYTES} bytes.")
    try:
        raw = tomllib.loads(toml.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"The study's file is not valid TOML: {error}.") from error
    _refuse_unknown(raw, StudyFile, "")
    _refuse_unknown(raw.get("aggregation"), AggregationSection, "aggregation.")
    queries = raw.get("queries")
    for place, query in enumerate(queries if isinstance(queries, list) else (), start=1):
        _refuse_unknown(query, QuerySection, f"queries[{place}].")
        # Whatever the query is, what it says must have a canonical form.
        canonical_json(query.get("ask") if isinstance(query, Mapping) else None)
    try:
        return Draft(msgspec.convert(raw, StudyFile))
    except msgspec.ValidationError as error:
        raise ManifestError(f"The study's file: {error}. Correct it and try again.") from error


def parse_study(toml: bytes) -> Study:
    """Read a file that leaves nothing out. Raises `ManifestError`."""
    return parse_draft(toml).complete()


def _refuse_unknown(table: object, kind: type[msgspec.Struct], prefix: str) -> None:
    if not isinstance(table, Mapping):
        return
    for key in table:
        if key not in kind.__struct_fields__:
            near = difflib.get_close_matches(key, kind.__struct_fields__, n=1, cutoff=0.5)
            hint = (
                f"Did you mean “{near[0]}”?"
                if near
                else (f"Known here: {', '.join(sorted(kind.__struct_fields__))}.")
            )
            raise ManifestError(f"Unknown key “{prefix}{key}”. {hint}")


def encode_toml(study: Study) -> str:
    """A whole study as a file that `parse_study` reads again; for people, not for hashing."""
    lines = [
        *(f"{name} = {toml_value(getattr(study, name))}" for name in _WRITTEN),
        "",
        "[aggregation]",
        *(
            f"{name} = {getattr(study.aggregation, name)}"
            for name in AggregationSection.__struct_fields__
        ),
    ]
    if study.run_config:
        lines += ["", "[run_config]"]
        lines += [
            f"{toml_value(key)} = {toml_value(value)}" for key, value in study.run_config.items()
        ]
    for query in study.queries:
        lines += [
            "",
            "[[queries]]",
            f"epsilon = {query.epsilon!r}",
            f"delta = {query.delta!r}",
            f"columns = {toml_value(query.columns)}",
            f"mechanism = {toml_value(query.noise.mechanism)}",
            f"scale = {query.noise.scale!r}",
            f"ask = {toml_value(msgspec.json.decode(query.ask))}",
        ]
    return "\n".join(lines) + "\n"


_WRITTEN: Final = (
    *_KEPT, "valid_from", "valid_until", "epsilon", "delta", "rounds", "sites", "roster",
    "code_hash",
)  # fmt: skip


def toml_value(value: object) -> str:
    """A value as TOML has it in one line. Raises `ManifestError` for what TOML has no form of."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # A JSON string is a TOML basic string, but for the one character that TOML forbids.
            return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(toml_value(one) for one in value)}]"
        case Mapping():
            inner = ", ".join(f"{_key(key)} = {toml_value(one)}" for key, one in value.items())
            return f"{{ {inner} }}"
        case _:
            raise ManifestError("A declaration may hold texts, numbers, truth values and tables.")


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)
