"""Past decisions, read from the audit trail for `havengate policy replay`.

The trail says who was decided on, in which role, for which purpose, on which types and labels; who
is meant is sealed and stays so. What rules may need beside that (relations to a patient, age of a
break-glass grant, scopes) is not in an entry, so a record stands for a question only where these
play no part; `policies.replay` counts those where they do and judges none of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

from audit.entry import parse_entry
from audit.errors import AuditError
from audit.model import Entry
from audit.reader import LogReader
from audit.retention import first_readable
from policies.errors import RecordsUnavailableError
from policies.model import (
    ACTIONS,
    PURPOSES,
    Action,
    Assurance,
    Context,
    Principal,
    PrincipalKind,
    Purpose,
    Request,
    Resource,
    SecondFactor,
    ServiceKind,
)

_ACTIONS: dict[str, Action] = {name: name for name in ACTIONS}
_PURPOSES: dict[str, Purpose] = {name: name for name in PURPOSES}
_SECOND_FACTORS: dict[str, SecondFactor] = {name: name for name in get_args(SecondFactor)}
_KINDS: dict[str, ServiceKind] = {name: name for name in get_args(ServiceKind)}
_PRINCIPALS: dict[str, PrincipalKind] = {
    "person": "user",
    "service": "service",
    "anonymous": "anonymous",
}
#: Stands for whoever is sealed: a record that a rule about one person decided is not reproduced.
_SOMEBODY = "somebody"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrailDecision:
    """`policies.replay.RecordedDecision` for one intent of the log."""

    index: int
    allowed: bool
    request: Request | None = field(repr=False)


def recorded_decisions(
    log: LogReader, since: int, *, retention_days: int
) -> Iterator[TrailDecision]:
    """Give every decision in the log from index `since` on, oldest first.

    Raises `RecordsUnavailableError` if the log cannot be read, or lacks what was not pruned.
    """
    try:
        first = first_readable(log, now_s=time.time(), retention_days=retention_days)
        for index, raw in log.read(max(since, first)):
            entry = parse_entry(raw)
            if entry.stage in {"intent", "opened"} and entry.decision in {"allow", "deny"}:
                yield TrailDecision(
                    index=index, allowed=entry.decision == "allow", request=_request(entry)
                )
    except AuditError as error:
        raise RecordsUnavailableError(
            f"The audit trail cannot be read: {error} Run havengate audit verify."
        ) from error


def _request(entry: Entry) -> Request | None:
    """The question that was asked, if the entry holds enough to ask it again."""
    action = _ACTIONS.get(entry.action)
    purpose = _PURPOSES.get(entry.purpose or "")
    kind = _KINDS.get(entry.details.get("kind", ""))
    who = _PRINCIPALS.get(entry.actor.kind)
    types = {resource.type for resource in entry.resources}
    if action is None or purpose is None or kind is None or who is None or len(types) != 1:
        return None
    if entry.break_glass is not None or entry.consent is not None or entry.part is not None:
        return None
    return Request(
        principal=Principal(
            kind=who,
            id=entry.actor.name or _SOMEBODY,
            roles=frozenset({entry.actor.role} if entry.actor.role else ()),
            assurance=_assurance(entry),
        ),
        action=action,
        resource=Resource(
            service=entry.service or "",
            kind=kind,
            type=types.pop(),
            labels=frozenset(entry.labels),
        ),
        context=Context(purpose=purpose, now=entry.time / 1_000_000),
    )


def _assurance(entry: Entry) -> Assurance:
    given = entry.assurance
    if given is None or given.age_s is None or given.level not in _SECOND_FACTORS:
        return Assurance()
    return Assurance(
        second_factor=_SECOND_FACTORS[given.level],
        second_factor_at=entry.time / 1_000_000 - given.age_s,
    )
