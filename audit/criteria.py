"""What can be asked of the log, and whether an entry answers it.

Lives here: `Criteria`, its check against one entry, and the words under which an entry is found.
The index (`audit.index`) finds candidates fast, `audit.search` and the exports check them here:
what is shown was read from the log and fits, whatever the index says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from audit.errors import MalformedQueryError

if TYPE_CHECKING:
    from audit.model import Entry

#: Characters of a word, beside letters and digits: identifiers stay whole.
WORD_MARKS = "-_.:/~"
_WORD = re.compile(rf"[A-Za-z0-9{re.escape(WORD_MARKS)}]{{1,96}}\*?").fullmatch
_SEPARATORS = re.compile(r"[._:/-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """All that is given must hold. Times are Unix microseconds, `until_us` exclusive.

    `actors` and `patients` are key ids, of which one must match; an empty tuple (not `None`)
    matches nothing, as for a person who was erased. Each of `words` must be a word of the entry,
    or with a star at its end, begin one.
    """

    tenant: str | None = None
    actors: tuple[str, ...] | None = None
    patients: tuple[str, ...] | None = None
    since_us: int | None = None
    until_us: int | None = None
    stage: str | None = None
    request: str | None = None
    service: str | None = None
    action: str | None = None
    decision: str | None = None
    outcome: str | None = None
    rule: str | None = None
    label: str | None = None
    words: tuple[str, ...] = ()

    def matches(self, entry: Entry) -> bool:
        """Whether an entry, read from the log, is what was asked for."""
        return (
            all(
                wanted is None or wanted == found
                for wanted, found in (
                    (self.tenant, entry.tenant),
                    (self.stage, entry.stage),
                    (self.request, entry.request),
                    (self.service, entry.service),
                    (self.action, entry.action),
                    (self.decision, entry.decision),
                    (self.outcome, entry.outcome),
                )
            )
            and (self.since_us is None or entry.time >= self.since_us)
            and (self.until_us is None or entry.time < self.until_us)
            and (self.rule is None or self.rule in entry.rules)
            and (self.label is None or self.label in entry.labels)
            and (self.actors is None or key_id(entry.actor.sealed) in self.actors)
            and (
                self.patients is None
                or any(key_id(sealed) in self.patients for sealed in entry.patients)
            )
            and self._words_match(entry)
        )

    def _words_match(self, entry: Entry) -> bool:
        if not self.words:
            return True
        found = entry_words(entry)
        return all(
            any(word.startswith(wanted[:-1]) for word in found)
            if wanted.endswith("*")
            else wanted in found
            for wanted in self.words
        )


def key_id(sealed: str | None) -> str | None:
    """Return the part between the dots of `hg1.<key id>.<data>`."""
    return sealed.split(".", 2)[1] if sealed else None


def parse_words(text: str) -> tuple[str, ...]:
    """Return the words of a search. Raises `MalformedQueryError` for what no entry can hold."""
    words = text.split()
    if not all(_WORD(word) for word in words):
        raise MalformedQueryError(
            f"A word to search for has letters, digits and {WORD_MARKS} only, as entries have, and "
            "may end in * for any ending."
        )
    return tuple(word.lower() for word in words)


def entry_words(entry: Entry) -> list[str]:
    """Return the words under which an entry is found."""
    codes = code_words(
        entry.action,
        entry.service,
        entry.reason,
        entry.break_glass,
        entry.labels,
        entry.rules,
        entry.obligations,
    )
    resources = [f"{one.type} {one.id}" if one.id else one.type for one in entry.resources]
    return " ".join([codes, *resources]).lower().split()


@lru_cache(maxsize=8192)
def code_words(*codes: str | tuple[str, ...] | None) -> str:
    """Return codes whole and in their pieces, separated by spaces. Few combinations occur."""
    found: dict[str, None] = {}
    for given in codes:
        for code in (given,) if isinstance(given, str) else given or ():
            found[code] = None
            found.update(dict.fromkeys(_SEPARATORS.split(code)))
    return " ".join(found)
