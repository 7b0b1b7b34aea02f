"""What a FHIR R4 request asks for: one reading of it, or none.

The grammar is that of FHIR R4's RESTful API (hl7.org/fhir/R4/http.html), made narrower wherever two
readers could understand a request differently: no percent-encoding in paths (types and ids need
none), no repeated parameter that can stand only once, JSON only, the method that stands on the
line. What is refused here has reached no app.

Before: `gateway.core`. After: `gateway.fhir.handler`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

from gateway import json_text
from gateway.core.messages import RequestHead
from gateway.errors import BadRequestError, UnsupportedError
from gateway.fhir.resources import Json, reference_target
from policies.model import Action

Name = Literal[
    "read", "vread", "update", "patch", "delete", "create", "search", "page", "history",
    "capabilities", "bundle", "everything", "validate", "export",
]  # fmt: skip

type Parameters = tuple[tuple[str, str], ...]

#: The parameter under which links for further pages come back.
PAGE: Final = "_hgpage"

_TYPE = re.compile(r"[A-Z][A-Za-z]{1,47}").fullmatch
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}").fullmatch
_DOTS = frozenset({".", ".."})
_JSON_FORMATS: Final = frozenset({"json", "application/json", "application/fhir+json", "text/json"})
_JSON_TYPES: Final = frozenset({"application/json", "application/fhir+json"})
_ACCEPTED: Final = _JSON_FORMATS | {"*/*", "application/*"}
_FORM: Final = "application/x-www-form-urlencoded"
_JSON_PATCH: Final = "application/json-patch+json"
_OVERRIDES: Final = ("x-http-method-override", "x-http-method", "x-method-override")
#: Parameters that say one thing.
_SINGLE: Final = frozenset(
    {"_format", "_pretty", "_summary", "_elements", "_total", "_count", "_sort", "_since", "_at",
     "_contained", "_containedType", PAGE}
)  # fmt: skip
_OPERATIONS: Final[Mapping[str, tuple[Name, Action]]] = MappingProxyType(
    {
        "$everything": ("everything", "export"),
        "$export": ("export", "export"),
        "$validate": ("validate", "execute"),
    }
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]").search


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """One FHIR interaction. `patients` are those whom the request itself names, without type.

    `compartment` is the patient in whose compartment is searched. `content` is the parsed body.
    `parameters` are decoded, in order, with those of a form. `form`: they came in a body.
    """

    name: Name
    action: Action
    type: str = ""
    id: str | None = field(default=None, repr=False)
    version: str | None = field(default=None, repr=False)
    compartment: str | None = field(default=None, repr=False)
    parameters: Parameters = field(default=(), repr=False)
    patients: frozenset[str] = field(default=frozenset(), repr=False)
    content: Any = field(default=None, repr=False)
    form: bool = False

    def parameter(self, name: str) -> str | None:
        """The value of a parameter that can stand only once."""
        return next((value for key, value in self.parameters if key == name), None)


def parse_head(head: RequestHead) -> Interaction:
    """Understand a request without its body. Raises `BadRequestError` or `UnsupportedError`."""
    for name in _OVERRIDES:
        if head.headers.get(name) is not None:
            raise BadRequestError("The method stands on the request line; leave the override out.")
    parameters = parse_query(head.query)
    check_format(head, parameters)
    return located(head.method, head.path, parameters)


def parse_interaction(head: RequestHead, body: bytes) -> Interaction:
    """Understand a whole request. Raises `BadRequestError` or `UnsupportedError`."""
    found = parse_head(head)
    kind = content_type(head)
    if found.name == "search" and head.method == "POST":
        return _with_form(head, found, body, kind)
    if found.name == "patch":
        if kind != _JSON_PATCH:
            raise BadRequestError(
                f"A patch is sent as {_JSON_PATCH} (RFC 6902); other kinds are not offered.",
                status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        return replace(found, content=parse_json(body, list))
    if head.method in {"GET", "HEAD", "DELETE"}:
        if body:
            raise BadRequestError("This request must not have a body.")
        return found
    if kind not in _JSON_TYPES and (body or kind is not None):
        raise BadRequestError(
            "The body must be application/fhir+json.", status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        )
    if not body and found.name in {"everything", "export"}:
        return found
    content = parse_json(body, dict)
    if found.name in {"everything", "export"}:
        return _with_parameters(found, content)
    return replace(found, content=content)


def located(  # noqa: PLR0911 - one table of the grammar
    method: str, path: str, parameters: Parameters
) -> Interaction:
    """What a method and a path below the base ask for."""
    method = "GET" if method == "HEAD" else method
    match _segments(path):
        case []:
            return _at_base(method, parameters)
        case ["metadata"] if method == "GET":
            return Interaction(name="capabilities", action="read", type="CapabilityStatement")
        case [str(kind)] if _TYPE(kind):
            return _at_type(method, kind, parameters)
        case [str(kind), "_search"] if _TYPE(kind) and method == "POST":
            return _searching(kind, parameters, form=True)
        case [str(kind), "_history"] if _TYPE(kind) and method == "GET":
            return Interaction(name="history", action="history", type=kind, parameters=parameters)
        case [str(kind), str(word)] if _TYPE(kind) and word.startswith("$"):
            return _operation(method, word, kind, None, parameters)
        case [str(kind), str(one), *rest] if _TYPE(kind) and _is_id(one):
            return _at_instance(method, kind, one, rest, parameters)
    raise UnsupportedError(
        "There is no such FHIR R4 interaction at this address.", status=HTTPStatus.NOT_FOUND
    )


def parse_query(query: str) -> Parameters:
    """Parameters in order. Raises `BadRequestError` for what two readers could read differently."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=200)
    except ValueError as error:
        raise BadRequestError(
            "The query must be percent-encoded UTF-8 with at most 200 parameters."
        ) from error
    seen: set[str] = set()
    for name, value in pairs:
        if not name or _CONTROL(name) or _CONTROL(value):
            raise BadRequestError("The query has a parameter without a name, or control codes.")
        if name in _SINGLE and name in seen:
            raise BadRequestError(f"The parameter {name} stands more than once; say it once.")
        seen.add(name)
    return tuple(pairs)


def check_format(head: RequestHead, parameters: Parameters) -> None:
    """JSON only. Raises with status 406 if the client wants something else."""
    asked = next((value for name, value in parameters if name == "_format"), None)
    if asked is not None:
        # A plus sign that was not encoded arrives as a space.
        plain = asked.partition(";")[0].strip().lower().replace(" ", "+")
        accepted = plain in _JSON_FORMATS
    else:
        ranges = ",".join(head.headers.all("accept")).lower().split(",")
        plains = {one.partition(";")[0].strip() for one in ranges} - {""}
        accepted = not plains or not plains.isdisjoint(_ACCEPTED)
    if not accepted:
        raise UnsupportedError(
            "Answers are FHIR as JSON: ask for application/fhir+json. What cannot be looked "
            "into cannot be released.",
            status=HTTPStatus.NOT_ACCEPTABLE,
        )


def content_type(head: RequestHead) -> str | None:
    """The media type of the body, without parameters. Raises for two."""
    values = head.headers.all("content-type")
    if len(values) > 1:
        raise BadRequestError("The request has more than one content-type.")
    return values[0].partition(";")[0].strip().lower() if values else None


def parse_json[T: (list[Any], dict[str, Any])](body: bytes, kind: type[T]) -> T:
    """The body as JSON. What is sent on is always written anew from what was read here."""
    try:
        content = json_text.loads(body)
    except ValueError as error:
        raise BadRequestError("The body is not JSON in UTF-8.") from error
    if not isinstance(content, kind):
        raise BadRequestError(f"The body must be a JSON {'list' if kind is list else 'object'}.")
    return content


def is_type(word: str) -> bool:
    """Whether it can be the name of a resource type."""
    return _TYPE(word) is not None


def _is_id(word: str) -> bool:
    return _ID(word) is not None and word not in _DOTS


def _segments(path: str) -> list[str]:
    if "%" in path or "\\" in path:
        raise BadRequestError("Types and ids are plain letters, digits, “-” and “.”.")
    trimmed = path.removeprefix("/").removesuffix("/")
    segments = trimmed.split("/") if trimmed else []
    if not all(segments) or not _DOTS.isdisjoint(segments):
        raise BadRequestError("The path has an empty or relative part.")
    return segments


def _at_base(method: str, parameters: Parameters) -> Interaction:
    if method == "POST":
        return Interaction(name="bundle", action="execute", type="Bundle")
    if method == "GET" and any(name == PAGE for name, _ in parameters):
        return Interaction(name="page", action="search", parameters=parameters)
    raise UnsupportedError("Search one type at a time: GET [base]/Observation?…")


def _at_type(method: str, kind: str, parameters: Parameters) -> Interaction:
    if method == "GET":
        return _searching(kind, parameters)
    if method == "POST":
        return Interaction(name="create", action="create", type=kind, parameters=parameters)
    raise UnsupportedError(
        "Changes that find their record by a search are not offered: search first, then change "
        "the record by its id."
    )


def _at_instance(  # noqa: C901, PLR0911 - one table of the grammar
    method: str, kind: str, one: str, rest: list[str], parameters: Parameters
) -> Interaction:
    patients = frozenset({one}) if kind == "Patient" else frozenset[str]()
    base = Interaction(
        name="read", action="read", type=kind, id=one, patients=patients, parameters=parameters
    )
    match method, rest:
        case "GET", []:
            return base
        case "PUT", []:
            return replace(base, name="update", action="update")
        case "PATCH", []:
            return replace(base, name="patch", action="patch")
        case "DELETE", []:
            return replace(base, name="delete", action="delete")
        case "GET", ["_history"]:
            return replace(base, name="history", action="history")
        case "GET", ["_history", version] if _is_id(version):
            return replace(base, name="vread", action="history", version=version)
        case _, [word] if word.startswith("$"):
            return _operation(method, word, kind, one, parameters)
        case "GET", [other] if kind == "Patient" and _TYPE(other):
            return _searching(other, parameters, compartment=one)
        case "POST", [other, "_search"] if kind == "Patient" and _TYPE(other):
            return _searching(other, parameters, compartment=one, form=True)
        case _, [other] if _TYPE(other) or other == "*":
            raise UnsupportedError(
                "Only compartments of one patient and one type are offered: [base]/Patient/1/"
                "Observation. For others use a search parameter."
            )
    raise UnsupportedError(
        "There is no such FHIR R4 interaction at this address.",
        status=HTTPStatus.NOT_FOUND if rest else HTTPStatus.METHOD_NOT_ALLOWED,
    )


def _operation(
    method: str, word: str, kind: str, one: str | None, parameters: Parameters
) -> Interaction:
    if word not in _OPERATIONS or method not in {"GET", "POST"}:
        # `$lastn` too: a closed record would take the place of the one before it.
        raise UnsupportedError(
            "This operation is not offered: what it does and answers cannot be decided record "
            "by record."
        )
    name, action = _OPERATIONS[word]
    fitting = {
        "everything": kind == "Patient" and one is not None,
        "validate": one is None and method == "POST",
        "export": True,
    }
    if not fitting[name]:
        raise UnsupportedError("Offered are Patient/[id]/$everything and [Type]/$validate (POST).")
    return Interaction(
        name=name,
        action=action,
        type=kind,
        id=one,
        parameters=parameters,
        patients=(frozenset({one}) if one and kind == "Patient" else frozenset())
        | named_patients(kind, parameters),
    )


def _searching(
    kind: str, parameters: Parameters, *, compartment: str | None = None, form: bool = False
) -> Interaction:
    summary = next((value for name, value in parameters if name == "_summary"), None)
    named = named_patients(kind, parameters)
    return Interaction(
        name="search",
        action="count" if summary == "count" else "search",
        type=kind,
        compartment=compartment,
        parameters=parameters,
        patients=named | {compartment} if compartment else named,
        form=form,
    )


def named_patients(kind: str, parameters: Parameters) -> frozenset[str]:
    """Patients whom the parameters of a search name outright."""
    found: set[str] = set()
    for name, value in parameters:
        base, _, modifier = name.partition(":")
        if base == "_id" and kind == "Patient" and not modifier:
            found.update(one for one in value.split(",") if _is_id(one))
        elif base in {"patient", "subject"} and modifier in {"", "Patient"}:
            typed = base == "patient" or modifier == "Patient"
            for one in value.split(","):
                if typed and _is_id(one):
                    found.add(one)
                elif (target := reference_target(one)) and target[0] == "Patient":
                    found.add(target[1])
    return frozenset(found)


def _with_form(head: RequestHead, found: Interaction, body: bytes, kind: str | None) -> Interaction:
    if kind != _FORM and body:
        raise BadRequestError(
            f"Parameters of a search are sent as {_FORM}.",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError as error:
        raise BadRequestError("The form must be percent-encoded.") from error
    both = "&".join(part for part in (head.query, text) if part)
    parameters = parse_query(both)
    check_format(head, parameters)
    return _searching(found.type, parameters, compartment=found.compartment, form=True)


def _with_parameters(found: Interaction, content: Json) -> Interaction:
    """The parameters of an operation out of a `Parameters` resource."""
    listed = content.get("parameter", [])
    if content.get("resourceType") != "Parameters" or not isinstance(listed, list):
        raise BadRequestError("The body of an operation must be a Parameters resource.")
    pairs: list[tuple[str, str]] = []
    for one in listed:
        values = (
            [one[key] for key in one if key.startswith("value")] if isinstance(one, dict) else []
        )
        if len(values) != 1 or isinstance(values[0], dict | list) or "name" not in one:
            raise BadRequestError("Each parameter must have a name and one simple value.")
        pairs.append((str(one["name"]), str(values[0])))
    parameters = (*found.parameters, *pairs)
    named = found.patients | named_patients(found.type, parameters)
    return replace(found, parameters=parameters, patients=named)
