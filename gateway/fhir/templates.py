"""Records that came before, as JSON with gaps where sealed text stands.

The same records are read again and again. While the app gives the same bytes, whose a record is,
how it is labelled and what its JSON looks like stay the same too; only what is sealed must be
opened anew, under the keys and rules of the moment. A template keeps the former and never the
latter: nothing that was sealed is in it in clear. (What the app had before the gateway came, and
has in clear, it has in clear as well.) Labels are kept, also those that come from a sealed code;
the log has them as well.

Nothing is taken on trust: a template is made only of a record that was just opened and understood
in the long way, and is kept only if what it gives is that record's JSON byte by byte. What cannot
be kept so is not: a sealed element that is no text, a pseudonym, a numeral that must keep its text.

Templates are not used beyond `KEPT_S`, nor once keys were forgotten or the tables that labels come
from have changed. They leave memory with the next request for records of that route.
Before and after: `gateway.fhir.records`.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import orjson

from gateway.core.questions import patient_reference
from gateway.errors import UpstreamContentError
from gateway.fhir.fields import FieldPlan
from gateway.fhir.resources import Json
from keys.errors import KeysError
from policies.obligations import Obligation, RedisclosureNotice

if TYPE_CHECKING:
    from gateway.core.enforcement import Sealer
    from gateway.fhir.records import Record

#: How long a template is used, in seconds, and how much of them is kept in each worker.
KEPT_S: Final = 300.0
MAX_BYTES: Final = 16_777_216
#: How often what is too old is dropped, in seconds.
SWEEP_S: Final = 30.0
#: A record larger than this is not worth the room.
MAX_RECORD_BYTES: Final = 65_536
#: Records of which it is known that they came once.
MAX_SEEN: Final = 8_192
#: Ways in which one record is shown.
MAX_SHOWN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """JSON in pieces. Between piece n and n + 1 stands the sealed text of number `gaps[n]`."""

    pieces: tuple[bytes, ...] = field(repr=False)
    gaps: tuple[int, ...]
    notices: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return sum(map(sys.getsizeof, self.pieces)) + 16 * len(self.pieces) + 512

    def filled(self, values: Sequence[bytes]) -> bytes:
        """The JSON with values, which are JSON themselves, in its gaps."""
        parts = [self.pieces[0]]
        for gap, piece in zip(self.gaps, self.pieces[1:], strict=True):
            parts += (values[gap], piece)
        return b"".join(parts)


@dataclass(slots=True, kw_only=True)
class Template:
    """What is kept of one record. `record` is the one that it was made of, without its content.

    `texts` are sealed, and `open` opens them. `shown`: forms by the obligations that made them.
    """

    record: Record
    texts: tuple[str, ...] = field(repr=False)
    open: Callable[[], list[bytes]] = field(repr=False)
    form: Form
    marks: tuple[bytes, ...] = field(repr=False)
    until: float
    shown: dict[tuple[Obligation, ...], Form] = field(default_factory=dict, repr=False)
    #: Bytes of memory, about; `grow` tells whoever keeps it of more.
    size: int = 0
    grow: Callable[[int], None] = field(default=lambda _more: None, repr=False)

    def is_good(self, now: float) -> bool:
        """Whether it is not too old, by a clock that did not step back."""
        return self.until - KEPT_S <= now < self.until

    def weight(self) -> int:
        """Bytes of memory as it was made, about: what opens a text holds it once more."""
        texts = sum(map(sys.getsizeof, self.texts))
        return self.form.size + 2 * texts + 400 * len(self.texts) + 2048

    def opened(self) -> Opened | None:
        """What is sealed, opened now. None if any of it cannot be: then the long way says why."""
        try:
            values = [orjson.dumps(plain.decode()) for plain in self.open()]
        except (KeysError, UnicodeDecodeError):
            return None
        return Opened(template=self, values=values)


@dataclass(slots=True, kw_only=True)
class Opened:
    """A record by its template, for one exchange."""

    template: Template
    values: list[bytes] = field(repr=False)
    _content: Json | None = field(default=None, repr=False)

    @property
    def content(self) -> Json:
        """The opened record as JSON objects, made when somebody looks into it."""
        if self._content is None:
            self._content = orjson.loads(self.template.form.filled(self.values))
        return self._content

    def shown(self, obligations: tuple[Obligation, ...]) -> Form | None:
        """The form in which it is shown under these obligations, if it was before."""
        return self.template.shown.get(obligations)

    def remember(
        self,
        obligations: tuple[Obligation, ...],
        content: Json,
        show: Callable[[Json], Json],
    ) -> None:
        """Keep the form of `content`, which `show` makes of the opened record.

        `show` raises `UnkeptError` where something is put in that depends on who asks.
        """
        if len(self.template.shown) >= MAX_SHOWN:
            return
        marked = orjson.loads(self.template.form.filled(self.template.marks))
        try:
            form = _form(orjson.dumps(show(marked)), self.template.marks)
        except UnkeptError:
            return
        if form.filled(self.values) == orjson.dumps(content):
            notices = (one.notice for one in obligations if isinstance(one, RedisclosureNotice))
            self.template.shown[obligations] = Form(
                pieces=form.pieces, gaps=form.gaps, notices=frozenset(notices)
            )
            self.template.grow(form.size)


class UnkeptError(Exception):
    """This way of showing a record cannot be kept."""


class Templates:
    """The templates of one route in one worker. `plan` says what is sealed there."""

    def __init__(self, plan: FieldPlan, *, max_bytes: int = MAX_BYTES) -> None:
        self._plan = plan
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Template] = OrderedDict()
        self._size = 0
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._bound_to: tuple[object, ...] = ()
        self._swept = 0.0

    def __len__(self) -> int:
        return len(self._kept)

    def bind(self, *made_with: object) -> None:
        """Forget everything unless these are what the templates were made with."""
        if self._bound_to != made_with:
            self._kept.clear()
            self._seen.clear()
            self._size = 0
            self._bound_to = made_with

    def is_bound(self, *made_with: object) -> bool:
        """Whether no other exchange has bound them to something else meanwhile."""
        return self._bound_to == made_with

    def find(self, resource: Json, now: float) -> tuple[bytes, Template | None]:
        """The bytes by which a record is known, none if it is never kept, and its template."""
        try:
            raw = orjson.dumps(resource)
        except orjson.JSONEncodeError:
            return b"", None
        self._sweep(now)
        template = self._kept.get(raw)
        if template is None:
            return raw, None
        if not template.is_good(now):
            self._drop(raw)
            return raw, None
        self._kept.move_to_end(raw)
        return raw, template

    def offer(self, raw: bytes, resource: Json, record: Record, sealer: Sealer, now: float) -> None:
        """Keep a record that was opened and understood, once it came for the second time."""
        if not raw or len(raw) > MAX_RECORD_BYTES or record.broken is not None or not record.known:
            return
        mark = hash(raw)
        if mark not in self._seen:
            self._seen[mark] = None
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            return
        template = self._made(resource, record, sealer, now)
        opened = None if template is None else template.opened()
        if template is None or opened is None:
            return
        if template.form.filled(opened.values) != orjson.dumps(record.content):
            return
        # Libraries give bytes room that is not needed, and others may have been faster.
        raw = raw[:-1] + raw[-1:]
        if raw in self._kept:
            return
        template.grow = partial(self._grow, raw, template)
        self._kept[raw] = template
        self._grow(raw, template, sys.getsizeof(raw) + template.weight())

    def _grow(self, raw: bytes, template: Template, more: int) -> None:
        if self._kept.get(raw) is not template:
            return
        template.size += more
        self._size += more
        while self._size > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _sweep(self, now: float) -> None:
        """Drop what is too old, now and then."""
        if not 0 <= now - self._swept < SWEEP_S:
            self._swept = now
            for raw in [raw for raw, one in self._kept.items() if not one.is_good(now)]:
                self._drop(raw)

    def _drop(self, raw: bytes) -> None:
        self._size -= self._kept.pop(raw).size

    def _made(self, resource: Json, record: Record, sealer: Sealer, now: float) -> Template | None:
        person = patient_reference(*record.patients) if len(record.patients) == 1 else ""
        gaps = _Gaps()
        try:
            content = self._plan.unprotect(resource, person=person, sealer=gaps)
            opener = sealer.opener(person=person, service=gaps.service, sealed=gaps.sealed)
        except (UpstreamContentError, KeysError):
            return None
        marks = tuple(f'"{gaps.mark(n)}"'.encode() for n in range(len(gaps.sealed)))
        form = _form(orjson.dumps(content), marks)
        if len(form.gaps) != len(gaps.sealed):
            return None
        return Template(
            record=record.without_content(),
            texts=tuple(text for _, text in gaps.sealed),
            open=opener,
            form=form,
            marks=marks,
            until=now + KEPT_S,
        )


class _Gaps:
    """Stands where a sealer would and puts a mark that nobody can guess in place of a text."""

    def __init__(self) -> None:
        self.sealed: list[tuple[str, str]] = []
        self.service = ""
        self._nonce = secrets.token_hex(16)

    def mark(self, number: int) -> str:
        return f"gap-{self._nonce}-{number}"

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        del person
        self.service = service
        self.sealed.append((field, text))
        return self.mark(len(self.sealed) - 1).encode()


def _form(raw: bytes, marks: Sequence[bytes]) -> Form:
    """JSON cut at the marks in it."""
    if not marks:
        return Form(pieces=(raw[:-1] + raw[-1:],), gaps=())
    numbers = {mark: number for number, mark in enumerate(marks)}
    parts = re.split(b"(" + b"|".join(re.escape(mark) for mark in marks) + b")", raw)
    return Form(pieces=tuple(parts[::2]), gaps=tuple(numbers[mark] for mark in parts[1::2]))
