"""Searches: every record of an answer is decided alone, and nothing else shapes the answer.

A client must get what it would get from an app that never had the records which are closed to it.
So pages are filled here: the app's pages are read one after the other until enough records are open
to the one who asks; a link to go on is there only if another one is; a total counts only what may
be counted, and is left out unless everything was seen. Of what came by `_include` and `_revinclude`
only that stays which a released record leads to, or which leads to one.

Links of the app are never passed on: a client gets the place where to go on, sealed
(`gateway.fhir.links`), and what comes then is decided anew. `first`, `previous` and `last` are left
out: they would say how much lies between.

LimitRows bounds a search as a whole, however many pages it takes: otherwise it would bound nothing.
A Bundle that was cut off there says so in an OperationOutcome.

What cannot be helped: whoever measures time can tell that more was looked through than was given,
and a search that looks through more than `limits.looked_through` records ends early.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import orjson

from gateway.core.commands import Fetched
from gateway.core.enforcement import Steps
from gateway.errors import UnsupportedError, UpstreamContentError
from gateway.fhir import bundles
from gateway.fhir.app import App, parse
from gateway.fhir.pages import Gathered, Match, Pass, Place
from gateway.fhir.parameters import elements_tested
from gateway.fhir.query import (
    MAX_QUERY,
    Chain,
    Controls,
    Query,
    encoded,
    read_query,
    tests_hidden,
)
from gateway.fhir.records import Record, Records
from gateway.fhir.request import Interaction, named_patients
from gateway.fhir.resources import Json, reference_target
from policies.model import Allowed, Decision, Denied, Remedy
from policies.obligations import ExcludeFromCounts, LimitRows

#: Records by which a chain may be replaced, and chains within chains.
MAX_CHAINED: Final = 200
MAX_DEPTH: Final = 3

_TESTED: Final = Denied(
    reason="An element that this search tests is not open to you.",
    rules=(),
    remedy=Remedy(kind="administrator"),
)


class Searches:
    """See the module. One lives as long as one exchange."""

    def __init__(self, app: App, records: Records) -> None:
        self._app = app
        self._records = records
        self._limit = records.enforcement.limits.looked_through
        self._looked = 0

    # --- Going through the app's pages ------------------------------------------------------------

    def gather(
        self, place: Place, plan: Pass, want: int, *, total: bool = False
    ) -> Steps[Gathered]:
        """Find up to `want` records that may be released, from `place` on.

        With `total` goes on to the end, as far as may be looked, to count.
        """
        found = Gathered(rows=plan.rows)
        whole, counted = place.index == 0, 0
        here: Place | None = place
        while here is not None:
            entries, records, after = yield from self.page(here)
            yield from self._before(records)
            position = -1
            for entry, record in zip(entries, records, strict=True):
                if _is_included(entry, record, plan):
                    self._include(found, entry, record, plan)
                    continue
                position += 1
                if position < here.index:
                    continue
                match = self._judged(entry, record, plan, quiet=found.next is not None)
                if match is None:
                    continue
                counted += _counts(match)
                if found.next is None and not found.cut:
                    self._place(found, match, here, position, plan, want)
            if (found.next is not None or found.cut) and not total:
                return found
            if self._looked >= self._limit and after is not None:
                found.next = found.next or (None if found.cut else after)
                return found
            here = after
        found.counted = counted if whole else None
        return found

    def _place(
        self,
        found: Gathered,
        match: Match,
        here: Place,
        position: int,
        plan: Pass,
        want: int,
    ) -> None:
        rows = [one.rows for one in match.allowed.obligations if isinstance(one, LimitRows)]
        found.rows = min([found.rows, *rows])
        if plan.given + len(found.matches) >= found.rows:
            found.cut = True
        elif len(found.matches) >= want:
            found.next = replace(here, index=position)
        else:
            found.matches.append(match)

    def page(self, here: Place) -> Steps[tuple[list[Json], list[Record], Place | None]]:
        """One page of the app: entries, what stands in them, and where the next one is."""
        fetched: Fetched
        if here.form:
            fetched = yield from self._app.post_form(here.path, here.query)
        else:
            fetched = yield from self._app.get(here.path, here.query)
        bundle = parse(fetched)
        if bundle["resourceType"] != "Bundle":
            raise UpstreamContentError("The application did not answer a search with a Bundle.")
        entries = self._usable(bundles.entries(bundle))
        resources = [entry["resource"] for entry in entries]
        records = yield from self._records.opened(resources)
        self._looked += max(1, len(records))
        return entries, records, self._after(bundle, here)

    def _usable(self, entries: list[Json]) -> list[Json]:
        """Entries with a record. What an app says in an OperationOutcome may quote content."""
        return [
            entry
            for entry in entries
            if (content := bundles.entry_resource(entry)) is not None
            and content["resourceType"] != "OperationOutcome"
        ]

    def _before(self, records: list[Record]) -> Steps[None]:
        """Learn what must be known before the records of a page are decided."""
        del records
        yield from ()

    def _after(self, bundle: Json, here: Place) -> Place | None:
        for link in bundles.links_of(bundle):
            if link["relation"] == "next":
                url = link["url"]
                below = (here.path, url[1:]) if url[:1] == "?" else self._app.below(url)
                if below is None or (below == (here.path, here.query) and not here.form):
                    return None
                return Place(path=below[0], query=below[1])
        return None

    # --- Deciding ---------------------------------------------------------------------------------

    def _judged(self, entry: Json, record: Record, plan: Pass, *, quiet: bool) -> Match | None:
        decision = self._decision(record, plan)
        if isinstance(decision, Allowed) and self._tests_hidden(record, decision, plan):
            decision = _TESTED
        if isinstance(decision, Denied):
            if not quiet:
                self._records.withhold(plan.action, record, decision)
            return None
        return Match(record=record, allowed=decision, entry=entry)

    def _decision(self, record: Record, plan: Pass) -> Decision:
        return self._records.decide(plan.action, record)

    def _tests_hidden(self, record: Record, allowed: Allowed, plan: Pass) -> bool:
        if not plan.tested:
            return False
        hidden = self._records.hidden(record.type, allowed.obligations)
        return bool(hidden) and any(tests_hidden(record.type, n, hidden) for n in plan.tested)

    def _include(self, found: Gathered, entry: Json, record: Record, plan: Pass) -> None:
        decision = self._records.decide(plan.action, record)
        if isinstance(decision, Allowed):
            found.included.append(
                Match(record=record, allowed=decision, entry=entry, included=True)
            )

    # --- Chains -----------------------------------------------------------------------------------

    def resolved(self, query: Query, depth: int = 0) -> Steps[Place | None]:
        """The request to the app, chains carried out; None if nothing can match any more."""
        plain = list(query.plain)
        if query.chains and depth >= MAX_DEPTH:
            raise UnsupportedError(f"Chains lead over at most {MAX_DEPTH} steps; search in parts.")
        for chain in query.chains:
            ids = yield from self._chained(query.type, chain, depth)
            if chain.back:
                earlier = [value for name, value in plain if name == "_id"]
                for value in earlier:
                    ids &= frozenset(value.split(","))
                plain = [pair for pair in plain if pair[0] != "_id"]
            if not ids:
                return None
            if chain.back:
                plain.append(("_id", ",".join(sorted(ids))))
            else:
                names = ",".join(f"{chain.type}/{one}" for one in sorted(ids))
                plain.append((chain.reference, names))
        text = encoded(plain)
        if query.form or len(text) > MAX_QUERY:
            return Place(path=f"{query.path}/_search", query=text, form=True)
        return Place(path=query.path, query=text)

    def _chained(self, kind: str, chain: Chain, depth: int) -> Steps[frozenset[str]]:
        """Ids of the records that a chain leads over, of those alone that this person may see."""
        parameters = ((chain.name, chain.value),)
        allowed = yield from self._records.gate(
            "search", chain.type, named=named_patients(chain.type, parameters)
        )
        asked = Interaction(name="search", action="search", type=chain.type, parameters=parameters)
        obligations = [one for each in allowed for one in each.obligations]
        query = yield from self._records.enforcement.at_hand(
            lambda: read_query(asked, self._records, obligations)
        )
        tested = query.tested | ({chain.reference} if chain.back else frozenset())
        place = yield from self.resolved(query, depth + 1)
        if place is None:
            return frozenset()
        plan = Pass(kind="search", action="search", type=chain.type, tested=tested)
        found = yield from self.gather(place, plan, MAX_CHAINED)
        if found.next is not None or found.cut:
            raise UnsupportedError(
                f"More than {MAX_CHAINED} {chain.type} match in between; say more of them."
            )
        if not chain.back:
            return frozenset(one.record.id for one in found.matches if one.record.id)
        return frozenset(
            target[1]
            for one in found.matches
            for reference in _led_to(one.record, chain.reference)
            if (target := reference_target(reference)) is not None and target[0] == kind
        )

    # --- Answers ----------------------------------------------------------------------------------

    def release(self, found: Gathered, plan: Pass, how: Controls) -> list[Json]:
        """The entries of an answer: matches, then what they lead to."""
        if how.whole and not found.included:
            give = self._records.released_whole
            return [
                one
                for match in found.matches
                for one in self._listed(match, give(plan.action, match.record, match.allowed))
            ]
        entries: list[Json] = []
        shown: list[Json] = []
        for match in found.matches:
            content = self._records.released(plan.action, match.record, match.allowed)
            shown.append(content)
            entries += self._listed(match, content)
        room = max(0, found.rows - plan.given - len(entries))
        for match, content in self._linked(found, shown)[:room]:
            self._records.released(plan.action, match.record, match.allowed)
            entries.append(self._entry(match, content))
        return entries

    def _linked(self, found: Gathered, shown: list[Json]) -> list[tuple[Match, Json]]:
        """Of what was included: what released content leads to, or leads to it, again and again."""
        seen = {(one.record.type, one.record.id) for one in found.matches}
        waiting: dict[tuple[str, str | None], tuple[Match, Json]] = {}
        for match in found.included:
            key = (match.record.type, match.record.id)
            if key not in seen and key not in waiting:
                waiting[key] = (match, self._records.shown(match.record, match.allowed.obligations))
        kept: list[tuple[Match, Json]] = []
        reached = {target for one in shown for target in _targets(one)} if waiting else set()
        while True:
            new = {
                key
                for key, (_, content) in waiting.items()
                if key in reached or not seen.isdisjoint(_targets(content))
            }
            if not new:
                return kept
            for key in [key for key in waiting if key in new]:
                match, content = waiting.pop(key)
                kept.append((match, content))
                reached |= _targets(content)
            seen |= new

    def _listed(self, match: Match, content: Json | orjson.Fragment) -> list[Json]:
        """What stands in the answer for one match."""
        return [self._entry(match, content)]

    def _entry(self, match: Match, content: Json | orjson.Fragment) -> Json:
        entry: Json = {"resource": content}
        url = self._app.full_url(match.entry, match.record.type, match.record.id)
        if url is not None:
            entry = {"fullUrl": url, **entry}
        entry["search"] = {"mode": "include" if match.included else "match"}
        return entry


def _counts(match: Match) -> bool:
    labels = match.record.labels.codes
    return not any(
        isinstance(one, ExcludeFromCounts) and one.labels & labels
        for one in match.allowed.obligations
    )


def _is_included(entry: Json, record: Record, plan: Pass) -> bool:
    if plan.kind != "search":
        return False
    mode = (entry.get("search") or {}).get("mode")
    return mode == "include" or record.type != plan.type


def _targets(content: Json) -> set[tuple[str, str | None]]:
    """Everything that a resource refers to."""
    found: set[tuple[str, str | None]] = set()
    stack: list[Any] = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += [one for one in value if isinstance(one, dict | list)]
        elif isinstance(value, dict):
            reference = value.get("reference")
            if isinstance(reference, str) and (target := reference_target(reference)):
                found.add(target)
            stack += [one for one in value.values() if isinstance(one, dict | list)]
    return found


def _led_to(record: Record, parameter: str) -> list[str]:
    """References in the elements that a search parameter looks into."""
    paths = elements_tested(record.type, parameter)
    if paths is None:
        raise UnsupportedError("_has needs a reference that FHIR R4 defines for that type.")
    found: list[str] = []
    for path in paths:
        values: list[Any] = [record.content]
        for name in path.split(".")[1:]:
            values = [
                item
                for value in values
                if isinstance(value, dict)
                for item in _listed(value.get(name))
            ]
        found += [
            one["reference"]
            for one in values
            if isinstance(one, dict) and isinstance(one.get("reference"), str)
        ]
    return found


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
