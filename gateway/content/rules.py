"""What a request to an app that does not speak FHIR means: the rules of a route, compiled.

The most specific template wins: from left to right a literal goes before a variable, a variable
before `{rest*}`. Two templates of which neither is more specific are refused at the start. A path
that only an app which ignores case, a slash at the end, `;parameters` or a format suffix would take
for a path of the winning template is refused, so that another spelling never finds looser rules.

Before: `gateway.settings.RuleSettings`. After: `gateway.content.handler`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final
from urllib.parse import quote

from gateway.content.pointers import JSON, Pointer, parse_pointer
from gateway.errors import BadRequestError, GatewayConfigurationError, UnsupportedError
from gateway.routes import check_path, decoded, folded, segments_of
from gateway.settings import RouteSettings, RuleSettings
from policies.model import ACTIONS, Action

#: The type of what passes without being looked into.
PAGE: Final = "Page"
ACTION_OF_METHOD: Final[dict[str, Action]] = {
    "GET": "read", "HEAD": "read", "POST": "create", "PUT": "update", "PATCH": "patch",
    "DELETE": "delete",
}  # fmt: skip
#: Actions by which something may be changed, where a rule names one.
_CHANGED_AS: Final[dict[str, frozenset[Action]]] = {
    "PUT": frozenset({"create", "update", "execute"}),
    "PATCH": frozenset({"update", "patch", "execute"}),
    "DELETE": frozenset({"delete", "execute"}),
}
#: Longer ids are none.
MAX_ID: Final = 256

_TYPE = re.compile(r"[A-Za-z]{1,48}").fullmatch
_VARIABLE = re.compile(r"\{([a-z_]+)(\*)?\}").fullmatch
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}\Z").sub
_REST: Final = "{rest*}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodePointer:
    """Where codes stand, and in which system. Without one every table is searched for them."""

    pointer: Pointer
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One compiled rule. Pointers but `request_patient` and `items` are relative to one record."""

    template: tuple[str, ...]
    methods: frozenset[str]
    type: str
    action: Action | None
    patient: Pointer | None
    author: Pointer | None
    id: Pointer | None
    items: Pointer | None
    total: Pointer | None
    keep: tuple[Pointer, ...]
    request_patient: Pointer | None
    #: The query parameter that names the patient.
    patient_parameter: str
    codes: tuple[CodePointer, ...]
    public: bool

    @property
    def passes_unseen(self) -> bool:
        """Whether what it is about is passed in pieces and not looked into."""
        return self.type == PAGE

    @property
    def has_patients(self) -> bool:
        """Whether its records belong to patients."""
        named = self.patient or self.request_patient or self.patient_parameter
        return bool(named) or self.names_patient_in_path

    @property
    def names_patient_in_path(self) -> bool:
        """Whether the path says whose record it is."""
        return "{patient}" in self.template

    def action_for(self, method: str) -> Action:
        """What is asked for: as configured, or else by the method; a list is searched."""
        if self.action is not None:
            return self.action
        if self.items is not None and method in {"GET", "HEAD"}:
            return "search"
        return ACTION_OF_METHOD[method]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A rule, and what the path says."""

    rule: Rule
    patient: str | None = field(default=None, repr=False)
    id: str | None = field(default=None, repr=False)
    author: str | None = field(default=None, repr=False)


class Rules:
    """The rules of one route."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(sorted(rules, key=lambda rule: _rank(rule.template)))

    @property
    def types(self) -> dict[str, bool]:
        """The types there are, and whether each has patients by every rule that names it."""
        found: dict[str, bool] = {}
        for rule in self._rules:
            found[rule.type] = found.get(rule.type, True) and rule.has_patients
        return found

    def belong_to_patients(self, type_: str) -> bool:
        """Whether records of a type have patients by some rule that names it."""
        return any(rule.type == type_ and rule.has_patients for rule in self._rules)

    def match(self, method: str, path: str) -> Matched | None:
        """The rule for a request, or None if no template fits.

        Raises `BadRequestError` for a path that fits only in another spelling, `UnsupportedError`
        (405) for a method that the winning template is not for.
        """
        check_path(path)
        segments = segments_of(path)
        loosely = [rule for rule in self._rules if _fits_loosely(rule.template, segments)]
        if not loosely:
            return None
        best = _rank(loosely[0].template)
        fitting = [
            rule
            for rule in loosely
            if _rank(rule.template) == best and _fits(rule.template, segments)
        ]
        if not fitting:
            raise BadRequestError(
                "The path is nearly that of something that is known here. Write it as it is: "
                "capitals, the end, and no “;”."
            )
        for rule in fitting:
            if method in rule.methods:
                return _matched(rule, segments)
        raise UnsupportedError("This method is not offered for this here.", status=405)

    def places_of(self, type_: str, id_: str, patient: str | None) -> list[tuple[str, Matched]]:
        """Paths under which one record can be read, by rules that say what it is.

        `patient` is whose it is, if that is known. The surest path comes first: one that names
        nothing but the record.
        """
        places = []
        for rule in self._rules:
            if rule.type != type_ or rule.items is not None or "GET" not in rule.methods:
                continue
            if rule.action_for("GET") != "read" or "{id}" not in rule.template:
                continue
            values = {"{id}": id_} | ({} if patient is None else {"{patient}": patient})
            segments = [values.get(one, one) for one in rule.template]
            path = "/" + "/".join(quote(one, safe="") for one in segments)
            if not any(_VARIABLE(one) for one in segments) and self._leads_to(path, rule):
                found = Matched(
                    rule=rule, id=id_, patient=patient if rule.names_patient_in_path else None
                )
                places.append((path, found))
        return sorted(places, key=lambda place: place[1].rule.names_patient_in_path)

    def _leads_to(self, path: str, rule: Rule) -> bool:
        try:
            found = self.match("GET", path)
        except BadRequestError:
            return False
        return found is not None and found.rule is rule


def patient_id(value: JSON) -> str | None:
    """The id, without type, that a value names; None if it names none."""
    text = _scalar(value)
    if text is None:
        return None
    text = text.removeprefix("Patient/")
    return text if 0 < len(text) <= MAX_ID and "/" not in text and text.isprintable() else None


def _scalar(value: JSON) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value) if isinstance(value, str) or abs(value) < 2**63 else ""
    return text if 0 < len(text) <= MAX_ID else None


def patients_in(record: JSON, pointer: Pointer | None) -> frozenset[str] | None:
    """Whose a record is. None if it is not told, or told in a way that cannot be relied upon."""
    if pointer is None:
        return None
    named = [patient_id(value) for value in pointer.find(record)]
    known = frozenset(one for one in named if one is not None)
    return known if known and None not in named else None


def texts_in(record: JSON, pointer: Pointer | None) -> list[str]:
    """Texts and numbers at a pointer, as text."""
    found = pointer.find(record) if pointer is not None else []
    return [text for value in found if (text := _scalar(value)) is not None]


def codes_in(record: JSON, rule: Rule) -> list[tuple[str, str]]:
    """(system, code) of the codes in a record."""
    return [(one.system, code) for one in rule.codes for code in texts_in(record, one.pointer)]


# --- Templates ------------------------------------------------------------------------------------


def _kinds(template: tuple[str, ...]) -> tuple[int, ...]:
    """The template as its order: smaller is more specific."""
    return tuple(2 if one == _REST else 1 if _VARIABLE(one) else 0 for one in template)


def _rank(template: tuple[str, ...]) -> tuple[int, ...]:
    """The order in which templates are tried: a slash at the end changes nothing."""
    return _kinds(template[:-1] if len(template) > 1 and not template[-1] else template)


def _fits(template: tuple[str, ...], segments: tuple[str, ...]) -> bool:
    if template[-1] == _REST:
        if len(segments) < len(template):
            return False
        template, segments = template[:-1], segments[: len(template) - 1]
    return len(template) == len(segments) and all(
        mine == its or (_VARIABLE(mine) is not None and its != "")
        for mine, its in zip(template, segments, strict=True)
    )


def _fits_loosely(template: tuple[str, ...], segments: tuple[str, ...]) -> bool:
    """Whether some app would take the path for one of this template."""
    rest = template[-1] == _REST
    mine = _loose(template[:-1] if rest else template)
    its = _loose(segments)
    if rest:
        if len(its) < len(mine):
            return False
        exact, its = len(its) == len(mine), its[: len(mine)]
        if not exact:
            its = _loose(segments[: len(mine)], last=False)
            mine = _loose(template[:-1], last=False)
    return len(mine) == len(its) and all(
        one == other or (_VARIABLE(one) is not None and other != "")
        for one, other in zip(mine, its, strict=True)
    )


def _loose(segments: tuple[str, ...], *, last: bool = True) -> list[str]:
    """Segments without what apps may ignore; `last`: the path ends here."""
    loose = [one if _VARIABLE(one) else folded(one) for one in segments]
    while last and loose and not loose[-1]:
        loose.pop()
    if last and loose and not _VARIABLE(loose[-1]):
        loose[-1] = _SUFFIX("", loose[-1]) or loose[-1]
    return loose


def _matched(rule: Rule, segments: tuple[str, ...]) -> Matched:
    found: dict[str, str] = {}
    for mine, its in zip(rule.template, segments, strict=False):
        variable = _VARIABLE(mine)
        if variable is not None and variable[2] is None:
            found[variable[1]] = its
    patient = found.get("patient")
    if patient is not None and patient_id(patient) != patient:
        raise BadRequestError("Expected the id of a patient in the path, got something else.")
    return Matched(rule=rule, patient=patient, id=found.get("id"), author=found.get("author"))


# --- Compiling ------------------------------------------------------------------------------------


def compile_rules(settings: RouteSettings) -> Rules:
    """Check and compile. Raises `GatewayConfigurationError` with the route and what to write."""
    rules = [_compile(rule, settings) for rule in settings.rules]
    for one, other in combinations(rules, 2):
        if not _overlap(one.template, other.template):
            continue
        mine, its = _kinds(one.template), _kinds(other.template)
        same = mine == its and one.methods & other.methods
        if same or _neither(mine, its):
            raise _wrong(
                settings.name,
                f"the rules for {_written(one)} and {_written(other)} fit the same request and "
                "neither is more specific; give them other paths or methods",
            )
    return Rules(rules)


def _overlap(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether some path fits both."""
    for mine, its in zip(one, other, strict=False):
        if _REST in {mine, its}:
            return True
        if not (_VARIABLE(mine) or _VARIABLE(its) or mine == its):
            return False
    return len(one) == len(other)


def _neither(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    pairs = list(zip(one, other, strict=False))
    return any(mine < its for mine, its in pairs) and any(its < mine for mine, its in pairs)


def _compile(rule: RuleSettings, settings: RouteSettings) -> Rule:
    name = settings.name
    if not _TYPE(rule.type):
        raise _wrong(name, f"expected for {rule.path} a type of letters, got “{rule.type}”")
    if rule.action is not None and rule.action not in ACTIONS:
        raise _wrong(name, f"expected for {rule.path} an action that the rules know")
    unknown = set(rule.methods) - ACTION_OF_METHOD.keys()
    if unknown or not rule.methods:
        raise _wrong(name, f"expected for {rule.path} methods of {', '.join(ACTION_OF_METHOD)}")
    for method in rule.methods:
        if rule.action is not None and rule.action not in _CHANGED_AS.get(method, {rule.action}):
            raise _wrong(
                name,
                f"{rule.path} would let {method} through for whoever may {rule.action}: give "
                f"{method} a rule of its own, without action",
            )
    seen = settings.content == "json" and rule.type != PAGE
    pointed = (
        rule.patient, rule.author, rule.id, rule.items, rule.total, rule.request_patient,
        *rule.codes, *rule.keep,
    )  # fmt: skip
    if not seen and any(pointed):
        raise _wrong(
            name,
            f"{rule.path} passes without being looked into, so pointers find nothing there: leave "
            "them out, or write content = “json” and a type other than “Page”",
        )
    if (rule.total or rule.keep) and not rule.items:
        raise _wrong(name, f"total and keep of {rule.path} stand beside a list: write items, too")
    parameter = rule.request_patient.removeprefix("?")
    asked = rule.request_patient.startswith("?")
    _check_whose(rule, name)
    try:
        _check_places(rule)
        return Rule(
            template=_template(rule.path),
            methods=frozenset(rule.methods),
            type=rule.type,
            action=rule.action,
            patient=_pointer(rule.patient),
            author=_pointer(rule.author),
            id=_pointer(rule.id),
            items=_pointer(rule.items),
            total=_pointer(rule.total),
            keep=tuple(parse_pointer(one) for one in rule.keep),
            request_patient=None if asked else _pointer(rule.request_patient),
            patient_parameter=parameter if asked else "",
            codes=tuple(_code(one) for one in rule.codes),
            public=rule.public,
        )
    except ValueError as error:
        raise _wrong(name, str(error)) from error


def _check_whose(rule: RuleSettings, name: str) -> None:
    """What is there already may be somebody else's than the request says."""
    named = rule.patient or "{patient}" in rule.path
    if rule.request_patient and not named and {"PUT", "PATCH", "DELETE"} & set(rule.methods):
        raise _wrong(
            name,
            f"{rule.path} changes records, so whose one is must be read first: write in patient "
            "where a record names him",
        )


def _check_places(rule: RuleSettings) -> None:
    """Raise ValueError unless list, total and what is kept are members apart from each other."""
    beside = [parse_pointer(one) for one in (rule.total, *rule.keep) if one]
    places = [*beside, *([parse_pointer(rule.items)] if rule.items else [])]
    for place in places:
        if not place.steps or any(step == "*" or step.isdecimal() for step in place.steps):
            raise ValueError(f"expected items, total and keep of {rule.path} to name one member")
    for one, other in combinations(places, 2):
        if one.covers(other) or other.covers(one):
            raise ValueError(f"items, total and keep of {rule.path} overlap at {one}")


def _template(path: str) -> tuple[str, ...]:
    if not path.startswith("/"):
        raise ValueError(f"expected a path that begins with “/”, got “{path}”")
    template = tuple(path.split("/")[1:])
    names = []
    for place, segment in enumerate(template):
        variable = _VARIABLE(segment)
        if variable is not None:
            names.append(variable[1])
            if (variable[2] or variable[1] == "rest") and (
                segment != _REST or place != len(template) - 1
            ):
                raise ValueError(f"expected {_REST} at the end and nowhere else in {path}")
        elif set(segment) & set("{}*"):
            raise ValueError(f"expected a variable to be a whole segment in {path}")
        else:
            try:
                check_path(f"/{segment}")
            except BadRequestError as error:
                raise ValueError(f"expected plain segments in {path}: {error}") from error
    if len(set(names)) != len(names) or "" in template[:-1]:
        raise ValueError(f"expected each variable once and no “//” in {path}")
    return tuple(one if _VARIABLE(one) else decoded(one) for one in template)


def _pointer(text: str) -> Pointer | None:
    return parse_pointer(text) if text else None


def _code(text: str) -> CodePointer:
    pointer, _, system = text.partition("=")
    return CodePointer(pointer=parse_pointer(pointer), system=system)


def _written(rule: Rule) -> str:
    return "/" + "/".join(rule.template)


def _wrong(name: str, what: str) -> GatewayConfigurationError:
    return GatewayConfigurationError(f"Route “{name}”: {what}.")
