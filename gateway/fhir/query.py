"""What of a search the app is asked, and what is carried out here.

Whoever may search but not see an element could learn it by asking for records where it has some
value. So a parameter that tests a hidden element is refused, a chain or `_has` becomes a search of
its own whose results are decided like all others, and a sealed element is found by its blind index
alone. Whatever would make the app leave out parts in which labels are found never reaches it.

`Query.tested` goes further with the answer: a record of which just this person does not see a
tested element counts as not found (`gateway.fhir.search`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlencode

from gateway.errors import UnsupportedError
from gateway.fhir.fields import index_system
from gateway.fhir.parameters import elements_tested
from gateway.fhir.records import Records, keys_at_hand
from gateway.fhir.release import hidden_parameters
from gateway.fhir.request import PAGE, Interaction, Parameters, is_type
from policies.obligations import Obligation

#: Entries of a page if the client says nothing.
DEFAULT_COUNT: Final = 50
#: Longer queries are sent as a form: not every app takes long addresses.
MAX_QUERY: Final = 2_000

_OURS: Final = frozenset(
    {"_format", "_pretty", "_summary", "_elements", "_total", "_count", "_type", PAGE}
)
_REFUSED: Final = frozenset(
    {"_filter", "_query", "_content", "_text", "_list", "_contained", "_containedType"}
)
#: They look at what every record shows about itself.
_NEUTRAL: Final = frozenset({"_id", "_lastUpdated", "_profile", "_source", "_tag", "_security"})
_INCLUDES: Final = frozenset({"_include", "_revinclude"})
_SUMMARIES: Final = frozenset({"true", "false", "text", "data", "count"})
_TOTALS: Final = frozenset({"none", "estimate", "accurate"})
#: What a parameter that tests something may be called. Some apps take `_ELEMENTS` or ` _elements`
#: for `_elements`, and give meanings of their own to what begins so.
_TESTING: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}").fullmatch
_NUMBER: Final = re.compile(r"[0-9]{1,6}").fullmatch
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}").fullmatch
_OWN_SYSTEM: Final = "havengate.internal"
_COMMA: Final = re.compile(r"(?<!\\),")
#: Of references that may lead to one type only.
_TARGETS: Final = {
    "patient": "Patient", "encounter": "Encounter", "organization": "Organization",
    "location": "Location", "practitioner": "Practitioner", "medication": "Medication",
    "specimen": "Specimen", "device": "Device",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """How results are given: carried out here, after the decision."""

    count: int = DEFAULT_COUNT
    summary: str = "false"
    total: str = ""
    elements: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether records are wanted as they are released."""
        return not self.elements and self.summary not in {"text", "data", "true"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A condition on other records. `reference` leads there, or, with `back`, from there here."""

    reference: str
    type: str
    name: str
    value: str = field(repr=False)
    back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One search of one type. `plain` goes to the app; `chains` are carried out before."""

    type: str
    path: str
    plain: Parameters = field(repr=False)
    chains: tuple[Chain, ...] = field(default=(), repr=False)
    tested: frozenset[str] = frozenset()
    form: bool = False


def controls(interaction: Interaction) -> Controls:
    """Read what says how results are given. Raises `UnsupportedError`."""
    count = interaction.parameter("_count")
    if count is not None and not _NUMBER(count):
        raise UnsupportedError("_count must be a number.")
    summary = interaction.parameter("_summary") or "false"
    if summary not in _SUMMARIES:
        raise UnsupportedError("_summary must be true, false, text, data or count.")
    total = interaction.parameter("_total") or ""
    if total and total not in _TOTALS:
        raise UnsupportedError("_total must be none, estimate or accurate.")
    names = (interaction.parameter("_elements") or "").split(",")
    elements = frozenset(name.strip().rpartition(".")[2] for name in names if name.strip())
    if count == "0":
        summary = "count"
    return Controls(
        count=int(count or 0) or DEFAULT_COUNT, summary=summary, total=total, elements=elements
    )


def read_query(
    interaction: Interaction, records: Records, obligations: Iterable[Obligation]
) -> Query:
    """Take a search apart. `obligations` are those of the decision about the whole.

    Raises `UnsupportedError` for what would tell what may not be seen.
    """
    kind, place = interaction.type, f"/{interaction.type}"
    names = set[str]()
    if interaction.compartment is not None:
        place = f"/Patient/{interaction.compartment}{place}"
        names |= {one for one in ("patient", "subject") if elements_tested(kind, one) is not None}
    reader = _Reader(records, kind, records.hidden(kind, obligations))
    for name, value in interaction.parameters:
        reader.read(name, value)
    reader.check_names(names)
    return Query(
        type=kind,
        path=place,
        plain=tuple(reader.plain),
        chains=tuple(reader.chains),
        tested=frozenset(reader.tested | names) - _NEUTRAL,
        form=interaction.form,
    )


class _Reader:
    """Goes through the parameters of one search, one after the other."""

    def __init__(self, records: Records, kind: str, hidden: frozenset[str]) -> None:
        self.plain: list[tuple[str, str]] = []
        self.chains: list[Chain] = []
        self.tested: set[str] = set()
        self._records = records
        self._kind = kind
        self._hidden = hidden
        self._sealed = records.plan.sealed_parameters(kind)

    def read(self, name: str, value: str) -> None:
        base, _, modifier = name.partition(":")
        if base in _OURS:
            return
        if base in _REFUSED:
            raise UnsupportedError(f"The parameter {base} could look into anything; use others.")
        if base in _INCLUDES:
            self.plain.append((name, value))
        elif base == "_has":
            self.chains.append(_has(name, value))
        elif "." in name:
            chain = _chain(name, value)
            self.check_names({chain.reference})
            self.tested.add(chain.reference)
            self.chains.append(chain)
        elif base == "_sort":
            self._sort(value)
        else:
            self._condition(name, base, modifier, value)

    def check_names(self, names: set[str]) -> None:
        """Refuse to test what is hidden in every record of this type."""
        if any(tests_hidden(self._kind, name, self._hidden) for name in names - _NEUTRAL):
            raise UnsupportedError(
                "One of the parameters tests an element that is not open to you; search by others."
            )

    def _sort(self, value: str) -> None:
        names = {one.removeprefix("-") for one in value.split(",")}
        if not all(_testing(one) and one != "_tag" for one in names):
            raise UnsupportedError("_sort names search parameters: _sort=-date,code")
        if names & self._sealed:
            raise UnsupportedError("What is sealed cannot be sorted; sort by something else.")
        self.check_names(names)
        self.tested |= names
        self.plain.append(("_sort", value))

    def _condition(self, name: str, base: str, modifier: str, value: str) -> None:
        if not _testing(base):
            raise UnsupportedError("A parameter is not one that FHIR R4 has; use others.")
        if base == "_tag" and (modifier or _OWN_SYSTEM in value.lower()):
            raise UnsupportedError(
                "Tags are searched by exact value, and not those of the gateway."
            )
        self.check_names({base})
        self.tested.add(base)
        plan, sealer = self._records.plan, self._records.enforcement.sealer
        tokens: list[str] = []
        for one in _COMMA.split(value):
            with keys_at_hand():
                found = plan.search_tokens(self._kind, base, one, sealer=sealer)
            if found is None:
                break
            tokens += [f"{index_system(base)}|{token}" for token in found]
        else:
            if modifier:
                raise UnsupportedError(
                    f"{base} is sealed: it is found by its exact value alone, without modifier."
                )
            if not tokens:
                raise UnsupportedError(f"{base} is sealed and cannot be searched by that value.")
            self.plain.append(("_tag", ",".join(tokens)))
            return
        if base in self._sealed:
            raise UnsupportedError(f"{base} is sealed and has no index: it cannot be searched.")
        self.plain.append((name, value))


def tests_hidden(kind: str, parameter: str, hidden: frozenset[str]) -> bool:
    """Whether a parameter would, or may, test one of these elements."""
    if not hidden or parameter in _NEUTRAL:
        return False
    return parameter in hidden_parameters(kind, hidden) or elements_tested(kind, parameter) is None


def _testing(name: str) -> bool:
    return name in _NEUTRAL or _TESTING(name) is not None


def encoded(parameters: Iterable[tuple[str, str]]) -> str:
    """Parameters as they go to the app."""
    return urlencode(list(parameters))


def _chain(name: str, value: str) -> Chain:
    """`subject:Patient.family`, `patient.identifier`, and longer ones."""
    first, _, rest = name.partition(".")
    reference, _, kind = first.partition(":")
    target = kind or _TARGETS.get(reference, "")
    if not _NAME(reference) or not is_type(target) or not rest:
        raise UnsupportedError("Say the type in a chain: subject:Patient.family=…")
    return Chain(reference=reference, type=target, name=rest, value=value)


def _has(name: str, value: str) -> Chain:
    """`_has:Observation:patient:code`, and longer ones."""
    parts = name.split(":", 3)
    if len(parts) != 4 or not is_type(parts[1]) or not _NAME(parts[2]) or not parts[3]:  # noqa: PLR2004
        raise UnsupportedError("Write _has:Observation:patient:code=…")
    return Chain(reference=parts[2], type=parts[1], name=parts[3], value=value, back=True)
