"""Consents of patients, asked of a FHIR app so that a misunderstanding is never "there is none".

An app that takes `patient=1,2` for one strange id answers that there is nothing. So consents are
asked for one patient at a time, until the app has shown that it finds with a list of patients what
it finds for each; and matches of patients who were not asked for are an answer that cannot be
relied upon. What is in a consent is understood by `policies.consent`. Before: `gateway.facts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from gateway.relations import Reader
from gateway.routes import Route
from gateway.searches import Searches
from policies.consent import Consent, parse_consent

#: Patients who are asked about at once, where each has a question of his own.
ONE_BY_ONE: Final = 8
#: For so long an app that was seen to understand a list of patients, or not, is taken to do so.
UNDERSTOOD_S: Final = 3_600.0


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
        #: Whether the app of a route understands a list of patients, and until when that is known.
        self._lists: dict[str, tuple[bool, float]] = {}

    async def of(self, source: Route, patients: frozenset[str]) -> dict[str, list[Consent]]:
        """The consents of each. What cannot be relied upon is one that cannot be read."""
        if source.settings.patient_consents == "none":
            return {patient: [] for patient in patients}
        understands, until = self._lists.get(source.name, (False, 0.0))
        known = self._clock() < until
        if len(patients) > 1 and known and understands:
            found = await self._consents_of(source, patients)
            if found is not None:
                return found
        each = await self._one_by_one(source, patients)
        having = [patient for patient, consents in each.items() if any(one.id for one in consents)]
        if len(having) > 1 and not known:
            await self._learn(source, {patient: each[patient] for patient in having})
        return each

    async def _one_by_one(
        self, source: Route, patients: frozenset[str]
    ) -> dict[str, list[Consent]]:
        places = asyncio.Semaphore(ONE_BY_ONE)

        async def ask(patient: str) -> list[Consent]:
            async with places:
                found = await self._consents_of(source, frozenset({patient}))
            return [unreadable()] if found is None else found[patient]

        order = sorted(patients)
        answers = await asyncio.gather(*(ask(patient) for patient in order))
        return dict(zip(order, answers, strict=True))

    async def _learn(self, source: Route, each: dict[str, list[Consent]]) -> None:
        """See whether the app finds with a list of patients what it finds for each of them."""
        together = await self._consents_of(source, frozenset(each))
        understands = together is not None and all(
            {one.id for one in together[patient]} == {one.id for one in consents}
            for patient, consents in each.items()
        )
        self._lists[source.name] = understands, self._clock() + UNDERSTOOD_S

    async def _consents_of(
        self, source: Route, patients: frozenset[str]
    ) -> dict[str, list[Consent]] | None:
        """None if the answer cannot be relied upon."""
        resources = await self._searches.search(
            source, "Consent", {"patient": ",".join(sorted(patients))}
        )
        if resources is None:
            return None
        reader = self._reader(source)
        found: dict[str, list[Consent]] = {patient: [] for patient in patients}
        for resource in resources:
            consent = _read_consent(resource, reader)
            if consent.patient is not None and consent.patient not in patients:
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
