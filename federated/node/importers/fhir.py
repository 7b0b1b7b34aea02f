"""FHIR R4: Observations and QuestionnaireResponses, as a Bundle, single resources, or NDJSON.

Lives here: files, people, versions. What a resource says stands in `importers.fhir_values`.
Resources that are preliminary, or say why there is no value, are passed over.

A resource is known again by its id, or where it has none by what it says. Its newest version counts
(`meta.lastUpdated`, else `meta.versionId`, else its status), in whatever order versions come; one
that was entered in error takes the older ones back.

People are the subjects of the resources: `Patient/…`, with or without the server's address and a
version; a Bundle's `urn:uuid:` is led back to the Patient that it stands for. Whatever names no
patient is a bad row, unless the whole file was said to be one person's; so is a contained Patient,
who is somebody in that resource only. Ids are one server's: a file that speaks of people of two
servers is refused, since both may have a `Patient/1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from federated.errors import ImportDataError
from federated.node.columns import COLUMNS
from federated.node.daily import Reading, Retraction
from federated.node.importers.fhir_values import (
    Meta,
    Observation,
    Reference,
    Response,
    Values,
    is_known,
    values_of_items,
    values_of_observation,
)
from federated.node.importers.reading import (
    Found,
    Moment,
    Options,
    Part,
    Progress,
    Server,
    bad,
    day_number,
    last_moment,
    moment,
    parse_json,
    parse_time,
    parts,
    reading,
    record_of,
    written_at,
)

#: Statuses that count, with which is newer where nothing else says it.
_RANKS: Final[Mapping[str, int]] = {
    "final": 0, "completed": 0, "amended": 1, "corrected": 2, "entered-in-error": 3,
}  # fmt: skip
_MISTAKE: Final = "entered-in-error"
_PATIENT = re.compile(
    r"(?:(https?://[^?#\s]+)/)?Patient/([A-Za-z0-9.-]{1,64})(?:/_history/[A-Za-z0-9.-]{1,64})?"
).fullmatch
_MOST_BESIDE: Final = 255
_LONGEST_NUMBER: Final = 12
_URN: Final = "urn:uuid:"
_MOST_LINE: Final = 16 << 20
_DATE_LENGTH: Final = 10


class _Head(msgspec.Struct, rename="camel"):
    resource_type: str = ""
    id: str = ""


class _Entry(msgspec.Struct, rename="camel"):
    full_url: str = ""
    resource: msgspec.Raw = msgspec.Raw(b"{}")


class _Bundle(msgspec.Struct):
    entry: list[_Entry] = []


class _Said(NamedTuple):
    """What a resource says, and of when."""

    values: Values
    when: Moment


class FHIR:
    """The importer."""

    name = "fhir"

    def recognises(self, path: Path, head: bytes) -> bool:
        """By `resourceType` near the beginning, or NDJSON files in a folder."""
        if path.is_dir():
            return any(path.glob("*.ndjson"))
        return b'"resourceType"' in head

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Found]:
        """Yield readings, resource by resource."""
        reader = _Reader(options)
        for part in parts(path, lambda name: name.endswith((".json", ".ndjson"))):
            for number, resource in _resources(part, reader, progress):
                try:
                    if isinstance(resource, ImportDataError):
                        raise resource
                    yield from reader.resource(resource)
                except ImportDataError as error:
                    yield bad(part.name, number, error)
        if reader.server and options.person is None:
            yield Server(address=reader.server)


def _resources(
    part: Part, reader: _Reader, progress: Progress
) -> Iterator[tuple[int, bytes | ImportDataError]]:
    first = part.opened.readline(_MOST_LINE)
    try:
        head = msgspec.json.decode(first, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = None
    if head is None or head.resource_type == "Bundle":
        content = first + part.whole()
        yield from _bundle(content, part.name, reader)
        progress(part.before + len(content), part.total)
        return
    number, line, done = 1, first, part.before + len(first)
    while line:
        if line.strip():
            yield number, line
        line = part.opened.readline(_MOST_LINE)
        number, done = number + 1, done + len(line)
        progress(min(done, part.total), part.total)


def _bundle(content: bytes, name: str, reader: _Reader) -> Iterator[tuple[int, bytes]]:
    head = parse_json(content, name, _Head)
    if head.resource_type != "Bundle":
        yield 1, content
        return
    entries = parse_json(content, name, _Bundle).entry
    for entry in entries:
        found = parse_json(bytes(entry.resource), name, _Head)
        if found.resource_type == "Patient" and entry.full_url.startswith(_URN):
            # A Patient that was not stored yet has no id but the Bundle's.
            known = found.id or entry.full_url.removeprefix(_URN)
            reader.patients[entry.full_url] = f"Patient/{known}"
    for number, entry in enumerate(entries, start=1):
        yield number, bytes(entry.resource)


class _Reader:
    """Reads resources; knows whom a Bundle's references mean."""

    def __init__(self, options: Options) -> None:
        self.patients: dict[str, str] = {}
        self._options = options
        self._only: str | None = None
        self.server = ""

    def resource(self, raw: bytes) -> Iterable[Reading | Retraction]:
        """The readings of one resource. Raises `ImportDataError`."""
        kind = parse_json(raw, "The resource", _Head).resource_type
        if kind == "Observation":
            found = parse_json(raw, "The Observation", Observation)
            return self._of(kind, found, self._observation)
        if kind == "QuestionnaireResponse":
            response = parse_json(raw, "The QuestionnaireResponse", Response)
            return self._of(kind, response, self._response)
        if not kind:
            raise ImportDataError("This is not a FHIR resource: it has no resourceType.")
        return ()

    def _of[R: (Observation, Response)](
        self, kind: str, found: R, read: Callable[[R], _Said | None]
    ) -> Iterable[Reading | Retraction]:
        if found.status not in _RANKS or not is_known(found):
            return ()
        said = None if found.status == _MISTAKE else read(found)
        if said is None:
            return self._nothing(kind, found)
        person = self._person(found.subject)
        # Without an id it is what it says.
        name = found.id or (person, said.when, sorted(said.values.items()))
        record, version = record_of("fhir", kind, name), _version(found.meta, found.status)
        return [
            reading(
                COLUMNS[column], value, unit, person=person, when=said.when, source="fhir",
                record=record, version=version,
            )
            for column, (value, unit) in said.values.items()
        ]  # fmt: skip

    def _nothing(self, kind: str, found: Observation | Response) -> Iterable[Retraction]:
        """A resource that says nothing takes back what older versions of it said."""
        version = _version(found.meta, found.status)
        if not found.id or not version:
            return ()
        record = record_of("fhir", kind, found.id)
        return (Retraction(person=self._person(found.subject), record=record, version=version),)

    def _person(self, subject: Reference) -> str:
        named = self._options.person
        if named is not None and not subject.reference:
            return named
        name = self._patient(subject.reference)
        if named is None:
            return name
        # Everything is said to be one person's: then it must be.
        self._only = self._only or name
        if name != self._only:
            raise ImportDataError("The file speaks of several people, but one was named for it.")
        return named

    def _patient(self, reference: str) -> str:
        match = _PATIENT(self.patients.get(reference, reference))
        if match is None:
            raise ImportDataError(
                "The subject is not a reference to a patient, as in Patient/7: if the whole file "
                "is one person's, name them with --person."
            )
        server = match[1] or self.server
        if self.server not in {"", server}:
            raise ImportDataError(
                "The file speaks of people of two servers, who may have the same ids: keep the "
                "people of each server in a store of their own."
            )
        self.server = server
        return f"Patient/{match[2]}"

    def _observation(self, found: Observation) -> _Said | None:
        return _said(values_of_observation(found), lambda: self._when(found))

    def _when(self, found: Observation) -> Moment:
        period = found.effective_period
        if period is None:
            return self._moment(found.effective_date_time or found.effective_instant)
        return self._moment(period.end or period.start, ends=bool(period.end))

    def _moment(self, text: str, *, ends: bool = False) -> Moment:
        if len(text) < _DATE_LENGTH:
            raise ImportDataError("The time names no day, so it belongs to none.")
        if len(text) == _DATE_LENGTH:
            day = day_number(parse_time(text).date())
            return Moment(day, day * 86_400)
        found: datetime = parse_time(text)
        return moment(last_moment(found) if ends else found, self._options.time_zone)

    def _response(self, found: Response) -> _Said | None:
        return _said(values_of_items(found), lambda: self._moment(found.authored))


def _said(values: Values, when: Callable[[], Moment]) -> _Said | None:
    return _Said(values, when()) if values else None


def _version(meta: Meta, status: str) -> int:
    """Larger for what was written later: by time, then by number, then by status."""
    written, text = written_at(meta.last_updated), meta.version_id
    number = int(text) if text.isdecimal() and len(text) <= _LONGEST_NUMBER else 0
    # Beside a time the number decides between versions of one microsecond only.
    number = min(number, _MOST_BESIDE) if written else number
    return (written << 10) + (number << 2) + _RANKS[status]
