"""How somebody stands to patients, and what these consented to: asked from a FHIR app.

Relations come from active CareTeams, `Patient.generalPractitioner` and Encounters in progress;
consents from Consent resources, understood by `policies.consent`. FHIR R4 sections CareTeam,
Patient, Encounter, Consent; search: http.html#search.

Deny on doubt: what cannot be had is a failure, never "no consents"; an answer that is there but
cannot be understood, or is not the whole one, counts as a consent that cannot be read, and as no
relation. (Not as a failure: a broken consent must not keep an emergency out.) What was asked is
kept for two seconds at most, so that a withdrawn consent bites within them, and `forget` drops it
at once; nobody is given the answer to a question that was asked longer ago, however slow the app.
Nothing here decides.

A FHIR app that has no Consent answers the question with an error, and so does one that is broken:
the gateway does not guess. It counts as a consent that cannot be read, the operational log says
once what to write, and only `patient_consents = "none"` in the route's settings ends it.

To an app that does not speak FHIR `7`, `07` and `7.json` may be one patient. So what such a path
names must be a Patient that the FHIR app knows by exactly this id, or its consents cannot be read.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import Final

from gateway.consents import Consents, unreadable
from gateway.core.commands import Facts, Failed
from gateway.identity.model import Identified
from gateway.relations import Reader
from gateway.routes import Route, names_patients
from gateway.searches import NOT_HAD, Fetch, Searches, UnusableError
from policies.consent import Consent

#: Not longer than what passes in pieces goes unasked (`gateway.core.recheck.RECHECK_S`).
KEPT_S: Final = 2.0
#: Patients in one question to the app.
BATCH: Final = 50
#: Patients that are remembered.
MAX_KEPT: Final = 4_096
#: Types whose change makes what is kept stale.
SOURCES: Final = frozenset({"CareTeam", "Consent", "Encounter", "Patient"})

_ID = re.compile(r"[A-Za-z0-9.-]{1,64}").fullmatch
_FOREIGN = Failed(
    code="gateway.facts_configuration",
    who="operator",
    message="The route that patient_facts names does not exist or does not speak FHIR.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is known of one patient. `treats` are references of those who treat.

    `exists`: the app has a Patient of this id.
    """

    exists: bool
    treats: frozenset[str] = field(repr=False)
    consents: tuple[Consent, ...] = field(repr=False)
    until: float


class FactsSource:
    """Answers `LoadFacts`. Lives as long as the process, on one event loop.

    `clock` is monotonic, `now` Unix time, both in seconds. `fetch` sends a request to a route's app
    as it is: its path is the app's own.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        fetch: Fetch,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        kept_s: float = KEPT_S,
    ) -> None:
        self._routes = {route.name: route for route in routes}
        self._searches = Searches(fetch)
        self._clock = clock
        self._now = now
        self._kept_s = min(kept_s, KEPT_S)
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        # With the time until which others may wait for the same answer.
        self._asked: dict[tuple[str, str], tuple[asyncio.Future[_Known | Failed], float]] = {}
        # Held by nobody else, a running question could be collected.
        self._running: set[asyncio.Task[None]] = set()
        self._consents = Consents(self._searches, clock=clock, reader=self._reader)

    async def load(
        self, route: Route, identified: Identified, patients: frozenset[str]
    ) -> Facts | Failed:
        """Facts about all of the patients, or a failure. Never raises for what an app does."""
        if _without_facts(route):
            return Facts(consents=dict.fromkeys(patients, ()))
        source = self._source(route)
        if source is None:
            return _FOREIGN
        # An id that FHIR does not admit is nobody's there, and must not come into a URL.
        strange = frozenset(one for one in patients if not _ID(one))
        answers = await self._all(source, patients - strange)
        consents: dict[str, tuple[Consent, ...]] = dict.fromkeys(strange, (unreadable(),))
        team = set()
        references = identified.principal.references
        for patient, known in answers.items():
            if isinstance(known, Failed):
                return known
            if not known.exists and route.settings.content != "fhir":
                consents[patient] = (unreadable(),)
                continue
            consents[patient] = known.consents
            if known.treats & references:
                team.add(patient)
        return Facts(care_team=frozenset(team), consents=consents)

    def forget(self, route: Route, patients: Iterable[str] | None = None) -> None:
        """Drop what is kept of patients, or of all: something that it was made of has changed.

        A question that is under way is not answered from any more.
        """
        source = self._source(route)
        if source is None:
            return
        name = source.name
        if patients is None:
            keys = {key for key in (*self._known, *self._asked) if key[0] == name}
        else:
            keys = {(name, patient) for patient in patients}
        for key in keys:
            self._known.pop(key, None)
            self._asked.pop(key, None)

    # --- Keeping ------------------------------------------------------------------------------

    def _source(self, route: Route) -> Route | None:
        """The route whose app is asked."""
        named = route.settings.patient_facts
        source = route if named in {"", "upstream"} else self._routes.get(named)
        return source if source is not None and source.settings.content == "fhir" else None

    async def _all(self, source: Route, patients: frozenset[str]) -> dict[str, _Known | Failed]:
        now = self._clock()
        found: dict[str, _Known | Failed] = {}
        waiting: dict[str, asyncio.Future[_Known | Failed]] = {}
        missing = []
        for patient in sorted(patients):
            key = (source.name, patient)
            known = self._known.get(key)
            if known is not None and now < known.until:
                found[patient] = known
            elif key in self._asked and now < self._asked[key][1]:
                waiting[patient] = self._asked[key][0]
            else:
                missing.append(patient)
        for batch in batched(missing, BATCH):
            waiting |= self._begin(source, batch, now)
        for patient, future in waiting.items():
            # Whoever gives up must not take the answer from the others who wait for it.
            found[patient] = await asyncio.shield(future)
        return found

    def _begin(
        self, source: Route, batch: tuple[str, ...], now: float
    ) -> dict[str, asyncio.Future[_Known | Failed]]:
        loop = asyncio.get_running_loop()
        futures = {patient: loop.create_future() for patient in batch}
        for patient, future in futures.items():
            self._asked[source.name, patient] = future, now + self._kept_s
        task = loop.create_task(self._ask(source, futures, now))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return futures

    async def _ask(
        self, source: Route, futures: dict[str, asyncio.Future[_Known | Failed]], now: float
    ) -> None:
        """Ask for a batch. Its age counts from before it was asked."""
        answer: dict[str, _Known] | Failed = NOT_HAD
        try:
            answer = await self._read(source, frozenset(futures), now + self._kept_s)
        except UnusableError as unusable:
            answer = unusable.failed
        except Exception:  # noqa: BLE001 - whoever waits is told that it cannot be had
            answer = NOT_HAD
        finally:
            for patient, future in futures.items():
                key = (source.name, patient)
                known = answer if isinstance(answer, Failed) else answer[patient]
                # Not kept if it was forgotten while it was asked for.
                if self._asked.get(key, _NOBODY)[0] is future:
                    del self._asked[key]
                    if isinstance(known, _Known):
                        self._keep(key, known)
                if not future.done():
                    future.set_result(known)

    def _keep(self, key: tuple[str, str], known: _Known) -> None:
        self._known.pop(key, None)
        self._known[key] = known
        while len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)

    # --- Asking -------------------------------------------------------------------------------

    async def _read(
        self, source: Route, patients: frozenset[str], until: float
    ) -> dict[str, _Known]:
        listed = ",".join(sorted(patients))
        teams, persons, visits, consents = await asyncio.gather(
            self._searches.search(source, "CareTeam", {"patient": listed, "status": "active"}),
            self._searches.search(source, "Patient", {"_id": listed}),
            self._searches.search(
                source, "Encounter", {"patient": listed, "status": "in-progress"}
            ),
            self._consents.of(source, patients),
        )
        reader = self._reader(source)
        treats: dict[str, set[str]] = {patient: set() for patient in patients}
        for resource in (*(teams or ()), *(persons or ()), *(visits or ())):
            patient, references = reader.relations(resource)
            if patient in treats:
                treats[patient] |= references
        existing = {one.get("id") for one in persons or () if isinstance(one.get("id"), str)}
        return {
            patient: _Known(
                exists=patient in existing,
                treats=frozenset(treats[patient]),
                consents=tuple(consents[patient]),
                until=until,
            )
            for patient in patients
        }

    def _reader(self, source: Route) -> Reader:
        return Reader(own=f"{_origin(source)}{source.upstream_base}/", now=self._now())


_NOBODY: Final = (None, 0.0)


def _without_facts(route: Route) -> bool:
    """Whether there are none by configuration: then there are no relations either."""
    facts = route.settings.patient_facts
    return facts == "none" or (not facts and not names_patients(route.settings))


def _origin(source: Route) -> str:
    return f"{source.upstream_scheme}://{source.upstream_authority}"
