"""Consents of patients, asked of a FHIR app so that a misunderstanding is never "there is none".

An app that takes `patient=1,2` for one strange id answers that there is nothing, and one that looks
at the first ten of a list answers for ten. So consents are asked for one patient at a time, until
the app has shown that it finds with a list of patients what it finds for each, and then in lists no
longer than that one: each patient in it had something to be found. Matches of patients who were not
asked for, and a `self` link that leaves some out, are an answer that cannot be relied upon. What is
in a consent is understood by `policies.consent`. Before: `gateway.facts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any, Final

from gateway.relations import Reader
from gateway.routes import Route
from gateway.searches import Searches
from policies.consent import Consent, parse_consent

#: Patients who are asked about at once, where each has a question of his own.
ONE_BY_ONE: Final = 8
#: Patients in one list.
MAX_LIST: Final = 50
#: For so long an app that was seen to understand a list of patients, or not, is taken to do so.
UNDERSTOOD_S: Final = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lists:
    """Which lists of patients an app understands, and until when (monotonic) that is known.

    `shown`: the longest of which it found everything. `worth_trying`: the longest that may still be
    tried; half of what it did not understand.
    """

    shown: int = 1
    worth_trying: int = MAX_LIST
    until: float = 0.0


class Consents:
    """Asks for consents. `clock` is monotonic, in seconds; `reader` reads references to an app."""

    def __init__(
        self,
        searches: Searches,
        *,
        clock: Callable[[], float],
        reader: Callable[[Route], Reader],
    ) -> None:
        self._searches = searches
        self._clock = clock
        self._reader = reader
        #: By the name of the route.
        self._lists: dict[str, _Lists] = {}

    async def of(self, source: Route, patients: frozenset[str]) -> dict[str, list[Consent]]:
        """The consents of each. What cannot be relied upon is one that cannot be read."""
        if source.settings.patient_consents == "none":
            return {patient: [] for patient in patients}
        lists = self._known_of(source)
        each = await self._in_lists(source, patients, lists.shown)
        having = {
            name: found
            for name, found in each.items()
            if any(one.id and one.patient == name for one in found)
        }
        if min(len(having), lists.worth_trying) > lists.shown:
            await self._learn(source, having)
        return each

    def _known_of(self, source: Route) -> _Lists:
        known = self._lists.get(source.name)
        return known if known is not None and self._clock() < known.until else _Lists()

    async def _in_lists(
        self, source: Route, patients: frozenset[str], longest: int
    ) -> dict[str, list[Consent]]:
        """Ask in lists of at most so many, and for each of a list that was of no use alone."""
        places = asyncio.Semaphore(ONE_BY_ONE)

        async def ask(listed: frozenset[str]) -> dict[str, list[Consent]] | None:
            async with places:
                return await self._consents_of(source, listed)

        lists = [frozenset(one) for one in batched(sorted(patients), longest)]
        answers = await asyncio.gather(*(ask(one) for one in lists))
        each = {patient: found for one in answers if one for patient, found in one.items()}
        missing = patients - each.keys()
        if longest == 1:
            return each | {patient: [unreadable()] for patient in missing}
        if missing:
            length = min(len(one) for one in lists if not one <= each.keys())
            self._misunderstood(source, length)
            each |= await self._in_lists(source, missing, 1)
        return each

    async def _learn(self, source: Route, having: dict[str, list[Consent]]) -> None:
        """See whether the app finds with a list of patients what it finds for each of them."""
        lists = self._known_of(source)
        length = min(len(having), lists.worth_trying)
        listed = sorted(having)[:length]
        together = await self._consents_of(source, frozenset(listed))
        if together is None or any(
            {one.id for one in together[patient]} != {one.id for one in having[patient]}
            for patient in listed
        ):
            self._misunderstood(source, length)
            return
        until = self._clock() + UNDERSTOOD_S
        self._lists[source.name] = replace(lists, shown=length, until=until)

    def _misunderstood(self, source: Route, length: int) -> None:
        lists = self._known_of(source)
        shown = lists.shown if lists.shown < length else 1
        until = lists.until if shown > 1 else self._clock() + UNDERSTOOD_S
        self._lists[source.name] = _Lists(
            shown=shown, worth_trying=max(shown, length // 2), until=until
        )

    async def _consents_of(
        self, source: Route, patients: frozenset[str]
    ) -> dict[str, list[Consent]] | None:
        """None if the answer cannot be relied upon."""
        # After a list that is not understood each patient is asked about.
        trial = len(patients) > 1
        resources = await self._searches.search(
            source,
            "Consent",
            {"patient": ",".join(sorted(patients))},
            wanted=patients,
            trial=trial,
        )
        if resources is None:
            return None
        reader = self._reader(source)
        found: dict[str, list[Consent]] = {patient: [] for patient in patients}
        for resource in resources:
            consent = _read_consent(resource, reader)
            if consent.patient is not None and consent.patient not in patients:
                if not trial:
                    self._searches.tell(
                        source, "Consent", "consents of patients who were not asked for"
                    )
                return None
            # A consent of which it cannot be told whose it is may be anybody's.
            for patient in patients if consent.patient is None else (consent.patient,):
                found[patient].append(consent)
        return found


def unreadable() -> Consent:
    """A consent of which nothing can be told: it counts as a refusal."""
    return Consent(id="", patient=None, in_force=True, readable=False)


def _read_consent(resource: dict[str, Any], reader: Reader) -> Consent:
    """A consent of the app's own patients; one about another server's cannot be relied upon."""
    consent = parse_consent(resource)
    if consent.patient is None or reader.reference(resource.get("patient")) is not None:
        return consent
    return replace(consent, readable=False)
