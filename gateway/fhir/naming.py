"""Brings the pseudonyms of an answer into memory before the answer is made.

Making a pseudonym asks the key table, which nothing that makes an answer may wait for. So records
that a rule shows under pseudonyms are shown once for nothing, until nothing is lacking. Before:
the decisions (`gateway.fhir.records`). After: the release, which notes for the log what goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from gateway.core.enforcement import Steps
from gateway.fhir.records import Record, Records
from policies.model import Allowed


def name_ahead(records: Records, going: Iterable[tuple[Record, Allowed]]) -> Steps[None]:
    """After it, showing these records as they were allowed asks nobody.

    Raises `UnavailableError`.
    """
    for record, allowed in going:
        show = partial(records.shown, record, allowed.obligations)
        yield from records.enforcement.name_ahead(allowed.obligations, show)
