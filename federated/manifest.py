"""A study: what it says, what must hold within one, and the one canonical form of its bytes.

Canonical JSON: sorted keys, no white space, floats in the shortest form that reads back (17 digits
at most), ASCII. How a researcher writes a study stands in `federated.draft`, who signs it in
`federated.signed_study`, that it was published in `federated.study_log`. No file, no clock; devices
run this on hostile bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import msgspec

from federated.errors import ManifestError
from federated.model import Mechanism, NoisePlan, TrustModel

type ConfigValue = bool | int | float | str

#: A larger manifest is refused unread.
MAX_MANIFEST_BYTES: Final = 65_536
MAX_QUERIES: Final = 64
MAX_COLUMNS: Final = 64
MAX_SITES: Final = 64
MAX_ROUNDS: Final = 10_000
MAX_TITLE: Final = 120
MAX_QUESTION: Final = 1000
MAX_DECLARATION_BYTES: Final = 8192
MAX_CONFIG_KEYS: Final = 64
#: No study that promises less than this is taken: an ε above it protects nobody.
MAX_EPSILON: Final = 16.0
MAX_VALIDITY_S: Final = 366 * 86_400
MAX_TIME_S: Final = 2**40
_MODULUS_BITS: Final = 64

_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])").fullmatch
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}").fullmatch
_HASH = re.compile(r"[0-9a-f]{64}").fullmatch
_PURPOSE = re.compile(r"[A-Z][A-Z0-9]{1,23}").fullmatch
_CONFIG_KEY = re.compile(r"[a-z][a-z0-9_.-]{0,63}").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredQuery:
    """One question of a study, and what its answer may cost each person.

    `ask` is the query's own declaration as canonical JSON (`federated.analytics.declare` reads it);
    `columns` all that it reads. `noise` is what the released sum carries; a device computes from it
    and the query's sensitivity what it pays, and never takes `epsilon` on trust.
    """

    name: str
    ask: str
    columns: tuple[str, ...]
    epsilon: float
    delta: float
    noise: NoisePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationRules:
    """What secure aggregation must hold to, in numbers of nodes.

    `threshold` are needed to unmask, at most `colluding` of them are in league with the server or
    read the answer knowing the noise that they added (so at least 1 where nodes add it), at least
    `minimum_survivors` are there at the end. Sums are modulo 2^`modulus_bits`.
    """

    threshold: int
    colluding: int
    minimum_survivors: int
    modulus_bits: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study, whole. Every instance holds to the rules of `verify_form`: making one checks it.

    `question` is for people. `purpose` is an HL7 PurposeOfUse code. `sites` must each approve,
    beside at least `ethics_approvals` members of the ethics board. `roster` is `roster_hash` of the
    nodes that may take part: nobody can be invented later. `code_hash` is `installed_code_hash` of
    what devices must run. `run_config` reaches Flower's run configuration, whole. `valid_from` and
    `valid_until` are Unix seconds. `epsilon` at `delta` bounds the whole study for each person.
    """

    id: str
    title: str
    question: str
    purpose: str
    queries: tuple[DeclaredQuery, ...]
    columns: tuple[str, ...]
    trust_model: TrustModel
    epsilon: float
    delta: float
    rounds: int
    minimum_cohort: int
    aggregation: AggregationRules
    sites: tuple[str, ...]
    ethics_approvals: int
    roster: str
    code_hash: str
    run_config: Mapping[str, ConfigValue] = field(default_factory=dict)
    valid_from: int
    valid_until: int
    unit: Literal["person"] = "person"
    adjacency: Literal["zero-out"] = "zero-out"

    def __post_init__(self) -> None:
        """Refuse what is malformed or cannot be kept. Raises `ManifestError`."""
        verify_form(self)
        # What was checked cannot be changed behind the check.
        object.__setattr__(self, "run_config", MappingProxyType(dict(self.run_config)))

    def canonical_bytes(self) -> bytes:
        """The one form that is hashed, sent and stored."""
        raw = canonical_json(_to_json(self))
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ManifestError(
                f"The manifest has {len(raw)} bytes, more than {MAX_MANIFEST_BYTES}: ask less."
            )
        return raw

    @property
    def study_hash(self) -> str:
        """SHA-256 of `canonical_bytes`, in hex."""
        return sha256(self.canonical_bytes()).hexdigest()

    def run_configuration(self) -> dict[str, ConfigValue]:
        """All that Flower's run is given: `run_config`, and which study this is. Nothing else."""
        return {**self.run_config, "study-id": self.id, "study-hash": self.study_hash}

    def query(self, name: str) -> DeclaredQuery:
        """The question of that name. Raises `ManifestError` if there is none."""
        for one in self.queries:
            if one.name == name:
                return one
        raise ManifestError(f"The study {self.id} asks no {name!r}.")


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ManifestError(message)


def verify_form(study: Study) -> None:
    """Check every rule that a study must hold to by itself. Raises `ManifestError`."""
    _verify_words(study)
    _verify_numbers(study)
    _verify_aggregation(study)
    _verify_config(study.run_config)
    _require(0 < len(study.queries) <= MAX_QUERIES, f"A study asks 1 to {MAX_QUERIES} questions.")
    for query in study.queries:
        _verify_query(study, query)
    names = [query.name for query in study.queries]
    _require(len(set(names)) == len(names), "Two queries of a study have the same name.")
    read = {column for query in study.queries for column in query.columns}
    _require(
        read == set(study.columns),
        "`columns` must name exactly what the queries read: "
        f"{', '.join(sorted(read ^ set(study.columns)))} is named on one side only.",
    )


def _text(what: str, text: str, most: int) -> None:
    _require(
        text.strip() == text and text.isprintable() and bool(text),
        f"`{what}` must be one line of printable text.",
    )
    _require(len(text) <= most, f"`{what}` is longer than {most} characters.")


def _names(what: str, names: Sequence[str], most: int) -> None:
    _require(
        len(names) <= most and all(_NAME(name) for name in names),
        f"`{what}` must hold at most {most} names of a-z, 0-9, _ and -.",
    )
    _require(list(names) == sorted(set(names)), f"`{what}` must be sorted and name nothing twice.")


def _verify_words(study: Study) -> None:
    _require(
        _ID(study.id),
        "`id` must be 2 to 48 of a-z, 0-9 and -, such as sleep-and-mood-2026.",
    )
    _text("title", study.title, MAX_TITLE)
    _text("question", study.question, MAX_QUESTION)
    _require(_PURPOSE(study.purpose), "`purpose` must be an HL7 PurposeOfUse code, as HRESCH.")
    _require(study.unit == "person", "`unit` must be person: nothing less is protected here.")
    _require(study.adjacency == "zero-out", "`adjacency` must be zero-out.")
    _require(
        study.trust_model in get_args(TrustModel.__value__),
        f"`trust_model` must be one of {', '.join(get_args(TrustModel.__value__))}.",
    )
    _names("columns", study.columns, MAX_COLUMNS)
    _names("sites", study.sites, MAX_SITES)
    for what, value in (("roster", study.roster), ("code_hash", study.code_hash)):
        _require(_HASH(value), f"`{what}` must be a SHA-256 of 64 hex digits.")


def _whole(what: str, value: object, least: int, most: int) -> None:
    _require(
        type(value) is int and least <= value <= most,
        f"`{what}` must be a whole number from {least} to {most}.",
    )


def _cost(where: str, epsilon: object, delta: object, minimum_cohort: int) -> None:
    _require(
        type(epsilon) is float and 0 < epsilon <= MAX_EPSILON,
        f"{where}: `epsilon` must be above 0 and at most {MAX_EPSILON:g}.",
    )
    _require(
        type(delta) is float and 0 <= delta < 1 / minimum_cohort,
        f"{where}: `delta` must be below 1/minimum_cohort = {1 / minimum_cohort:.2g}: with more, "
        "one person of the cohort could be published whole.",
    )


def _verify_numbers(study: Study) -> None:
    _whole("minimum_cohort", study.minimum_cohort, 2, 10**9)
    _whole("rounds", study.rounds, len(study.queries), MAX_ROUNDS)
    _whole("ethics_approvals", study.ethics_approvals, 1, 16)
    _whole("valid_from", study.valid_from, 0, MAX_TIME_S)
    _whole("valid_until", study.valid_until, study.valid_from + 1, MAX_TIME_S)
    _require(
        study.valid_until - study.valid_from <= MAX_VALIDITY_S,
        "A study is valid for a year at most: propose it again after that.",
    )
    _cost("The study", study.epsilon, study.delta, study.minimum_cohort)
    costs = [query.epsilon for query in study.queries]
    _require(
        max(costs, default=0.0) <= study.epsilon <= math.fsum(costs) * (1 + 1e-9),
        "The study's `epsilon` must lie between its dearest query's and the sum of all.",
    )


def _verify_aggregation(study: Study) -> None:
    rules = study.aggregation
    _whole("aggregation.threshold", rules.threshold, 1, 10**6)
    _whole("aggregation.colluding", rules.colluding, 0, rules.threshold - 1)
    _require(
        rules.colluding >= 1 or study.trust_model != "secure_aggregation",
        "`aggregation.colluding` must be at least 1: each node knows the noise that it added, and "
        "may read the answer. It needs a `threshold` of 2 or more.",
    )
    _whole("aggregation.minimum_survivors", rules.minimum_survivors, rules.threshold, 10**6)
    _whole("aggregation.modulus_bits", rules.modulus_bits, 8, _MODULUS_BITS)


def _verify_config(config: Mapping[str, ConfigValue]) -> None:
    _require(len(config) <= MAX_CONFIG_KEYS, f"`run_config` has more than {MAX_CONFIG_KEYS} keys.")
    for key, value in config.items():
        _require(
            _CONFIG_KEY(key) and key not in {"study-id", "study-hash"},
            "A key of `run_config` must be made of a-z 0-9 _ . - and not name the study itself.",
        )
        _require(
            type(value) in {bool, int, float, str}
            and not (type(value) is float and not math.isfinite(value))
            and len(str(value)) <= MAX_QUESTION,
            f"`run_config.{key}` must be a short text, a number or a truth value.",
        )


def _verify_query(study: Study, query: DeclaredQuery) -> None:
    where = f"The query {query.name!r}"
    _require(_NAME(query.name), "A query's name is a-z 0-9 _ -.")
    _names(f"queries.{query.name}.columns", query.columns, MAX_COLUMNS)
    _cost(where, query.epsilon, query.delta, study.minimum_cohort)
    _require(len(query.ask) <= MAX_DECLARATION_BYTES, f"{where} is declared at too great length.")
    ask = parse_canonical(query.ask.encode(), what=where)
    _require(
        isinstance(ask, dict) and ask.get("name") == query.name,
        f"{where} is declared under another name.",
    )
    _require(
        query.noise.mechanism in get_args(Mechanism.__value__),
        f"{where}: `mechanism` must be one of {', '.join(get_args(Mechanism.__value__))}.",
    )
    _require(
        type(query.noise.scale) is float and 0 < query.noise.scale < float(2**62),
        f"{where}: `scale` of the noise must be above 0 and finite.",
    )
    _require(
        query.noise.mechanism == "discrete_laplace" or query.delta > 0,
        f"{where}: Gaussian noise needs a `delta` above 0.",
    )


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, no white space, ASCII only. Raises `ManifestError` for NaN or more."""
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            "A declaration may hold texts, finite numbers, truth values, lists and tables."
        ) from error


def parse_canonical(data: bytes, *, what: str) -> Any:
    """Read JSON that must be in the one canonical form. Raises `ManifestError`."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{what} has more than {MAX_MANIFEST_BYTES} bytes.")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{what} is not JSON.") from error
    if canonical_json(value) != data:
        raise ManifestError(f"{what} is not in its canonical form: it was changed on the way.")
    return value


class _Noise(msgspec.Struct, forbid_unknown_fields=True):
    mechanism: str
    scale: float


class _Query(msgspec.Struct, forbid_unknown_fields=True):
    ask: dict[str, Any]
    columns: list[str]
    delta: float
    epsilon: float
    noise: _Noise


class _Aggregation(msgspec.Struct, forbid_unknown_fields=True):
    colluding: int
    minimum_survivors: int
    modulus_bits: int
    threshold: int


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    adjacency: str
    aggregation: _Aggregation
    code_hash: str
    columns: list[str]
    delta: float
    epsilon: float
    ethics_approvals: int
    id: str
    minimum_cohort: int
    purpose: str
    queries: list[_Query]
    question: str
    roster: str
    rounds: int
    run_config: dict[str, bool | int | float | str]
    sites: list[str]
    title: str
    trust_model: str
    unit: str
    valid_from: int
    valid_until: int
    version: Literal[1]


def _to_json(study: Study) -> dict[str, Any]:
    plain = {
        name: getattr(study, name) for name in _Manifest.__struct_fields__ if name not in _MADE
    }
    rules = study.aggregation
    return {
        **plain,
        "version": 1,
        "run_config": dict(study.run_config),
        "aggregation": {name: getattr(rules, name) for name in _Aggregation.__struct_fields__},
        "queries": [
            {
                "ask": json.loads(query.ask),
                "columns": query.columns,
                "delta": query.delta,
                "epsilon": query.epsilon,
                "noise": {"mechanism": query.noise.mechanism, "scale": query.noise.scale},
            }
            for query in study.queries
        ],
    }


_MADE: Final = frozenset({"version", "run_config", "aggregation", "queries"})


def parse_manifest(data: bytes) -> Study:
    """Read canonical bytes, as they come from the wire or from a store. Raises `ManifestError`."""
    study = study_from_json(parse_canonical(data, what="The manifest"))
    if study.canonical_bytes() != data:
        raise ManifestError("The manifest is not in its canonical form: it was changed on the way.")
    return study


def study_from_json(value: object) -> Study:
    """Make a study of the plain values of its JSON. Raises `ManifestError`."""
    try:
        found = msgspec.convert(value, _Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError(f"The manifest is malformed: {error}.") from error
    values = {name: getattr(found, name) for name in _Manifest.__struct_fields__}
    del values["version"]
    values["aggregation"] = AggregationRules(
        **{name: getattr(found.aggregation, name) for name in _Aggregation.__struct_fields__}
    )
    values["columns"], values["sites"] = tuple(found.columns), tuple(found.sites)
    values["queries"] = tuple(_query_of(query) for query in found.queries)
    return Study(**values)


def _query_of(query: _Query) -> DeclaredQuery:
    name = query.ask.get("name")
    if not isinstance(name, str):
        raise ManifestError("A query has no name: write `name` in its declaration.")
    noise = NoisePlan(mechanism=query.noise.mechanism, scale=query.noise.scale)  # type: ignore[arg-type]
    return DeclaredQuery(
        name=name,
        ask=canonical_json(query.ask).decode(),
        columns=tuple(query.columns),
        epsilon=query.epsilon,
        delta=query.delta,
        noise=noise,
    )


def roster_hash(nodes: Mapping[str, bytes], sites: Mapping[str, str] | None = None) -> str:
    """SHA-256, in hex, of who may take part: node id → raw Ed25519 public key (32 bytes).

    `sites` are those of nodes that speak for a site's people; a person's own device has none. Who
    approves a study approves with it which site answers for whom.
    """
    listed = {id_: key.hex() for id_, key in nodes.items()}
    of = {id_: site for id_, site in (sites or {}).items() if site}
    # No key in hex holds an @: with and without a site are never the same.
    listed |= {id_: f"{listed.get(id_, '')}@{site}" for id_, site in of.items()}
    return sha256(b"havengate/roster/v1\n" + canonical_json(listed)).hexdigest()
