"""Rows of the ledger: what each says, how they hang together, and what the audit log says of them.

Lives here: the pure part. A row's hash covers every field and the hash of the row before it, so
that a changed, removed or reordered row is found by whoever reads the rows; that the newest ones
are missing (an older backup was restored) is found by comparing with the audit log, where each row
was recorded with its hash. Reading, writing and refusing stand in `federated.ledger`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, Final, Literal

from audit.model import Entry
from federated.errors import LedgerError, ManifestError
from federated.manifest import canonical_json
from federated.model import NoisePlan, PrivacyCost, Sensitivity

type RowKind = Literal["reserve", "spend", "mend"]

#: Stands for every participant, also one that nobody has heard of yet.
EVERYBODY: Final = "*"
GENESIS: Final = "0" * 64
_DOMAIN: Final = b"havengate/ledger/v1\n"
ACTIONS: Final = ("study.reserve", "study.spend", "study.mend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. `lost` is, in a mended row, the kind and hash of the row that it stands for.

    `at_us` is Unix time in microseconds. `participants_hash` is `participants_hash()` of those
    charged; whoever spends charges nobody again.
    """

    sequence: int
    kind: RowKind
    reservation: str
    study: str
    round: str
    cost: str
    participants: int
    participants_hash: str
    lost: str
    at_us: int
    previous: str
    hash: str = ""

    def sealed(self) -> Row:
        """The row with its hash."""
        return replace(self, hash=self.expected_hash())

    def expected_hash(self) -> str:
        """SHA-256, in hex, of everything else in the row."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "hash"}
        return sha256(_DOMAIN + canonical_json(values)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one round of a study cost those who were asked: what was reserved counts."""

    round: str
    cost: PrivacyCost


def participants_hash(participants: Iterable[str]) -> str:
    """SHA-256, in hex, of the sorted ids: what the log says of them, since ids name devices."""
    return sha256(b"havengate/participants/v1\n" + canonical_json(sorted(participants))).hexdigest()


def encode_cost(cost: PrivacyCost) -> str:
    """A cost as canonical JSON. Raises `LedgerError` where a figure of it is not finite."""
    values = {
        "closeness": cost.closeness,
        "delta": cost.delta,
        "epsilon": cost.epsilon,
        "l1": cost.sensitivity.l1,
        "l2": cost.sensitivity.l2,
        "mechanism": cost.noise.mechanism,
        "scale": cost.noise.scale,
    }
    try:
        return canonical_json(values).decode()
    except ManifestError as error:
        raise LedgerError("A round whose cost is not finite is not reserved.") from error


def parse_cost(text: str) -> PrivacyCost:
    """Read what `encode_cost` made. Raises `LedgerError`: an unknown cost is unbounded."""
    try:
        return _cost_of(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            "A row of the ledger says a cost that cannot be read. Nothing may be dispatched."
        ) from error


def _cost_of(values: Mapping[str, Any]) -> PrivacyCost:
    return PrivacyCost(
        epsilon=float(values["epsilon"]),
        delta=float(values["delta"]),
        closeness=float(values["closeness"]),
        noise=NoisePlan(mechanism=values["mechanism"], scale=float(values["scale"])),
        sensitivity=Sensitivity(l1=float(values["l1"]), l2=float(values["l2"])),
    )


def details_of(row: Row) -> dict[str, str]:
    """What an audit entry says of a row before it is written: enough to mend the ledger from."""
    cost = json.loads(row.cost)
    return {
        "reservation": row.reservation,
        "study": row.study,
        "round": row.round,
        "participants": row.participants_hash,
        **{name: value if isinstance(value, str) else repr(value) for name, value in cost.items()},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What the audit log says of one row: that it was written, in which place, with which hash."""

    kind: RowKind
    sequence: int
    hash: str
    reservation: str
    study: str
    round: str
    cost: str
    participants: int
    participants_hash: str

    @property
    def name(self) -> str:
        """What a mended row says that it stands for."""
        return f"{self.kind}:{self.hash}"


def recorded_rows(entries: Iterable[Entry]) -> list[Recorded]:
    """The rows that entries of the audit log speak of. Raises `LedgerError` for a garbled one."""
    return [
        _recorded(entry)
        for entry in entries
        if entry.action in ACTIONS and entry.stage == "outcome" and entry.outcome == "success"
    ]


def _recorded(entry: Entry) -> Recorded:
    given = entry.details
    kinds: dict[str, RowKind] = {
        "study.reserve": "reserve",
        "study.spend": "spend",
        "study.mend": "mend",
    }
    try:
        return Recorded(
            kind=kinds[entry.action],
            sequence=entry.counts["sequence"],
            hash=given["row"],
            reservation=given["reservation"],
            study=given["study"],
            round=given["round"],
            cost=encode_cost(_cost_of(given)),
            participants=entry.counts["participants"],
            participants_hash=given["participants"],
        )
    except (KeyError, ValueError) as error:
        raise LedgerError(
            "The audit log speaks of the ledger in a way that this release does not know."
        ) from error


def forgotten(rows: Sequence[Row], recorded: Sequence[Recorded]) -> str | None:
    """What the ledger lost and the log, pruned meanwhile, no longer says; None if there is nothing.

    The oldest row of which the log still speaks had so many before it. Where it is there, its hash
    covers them. Where it is lost, they must stand in the ledger: nothing can tell what they were.
    """
    if not recorded:
        return None
    oldest = min(recorded, key=lambda one: one.sequence)
    if any(row.hash == oldest.hash for row in rows):
        return None
    spoken_of = {one.hash for one in recorded}
    older = {row.sequence for row in rows if row.hash not in spoken_of and row.kind != "mend"}
    missing = [place for place in range(1, oldest.sequence) if place not in older]
    if not missing:
        return None
    return (
        f"{len(missing)} row(s) from row {missing[0]} on are lost, and the log was pruned and no "
        "longer says what they were: an older backup was restored"
    )


def chain_problems(rows: Sequence[Row], charged: Mapping[int, Collection[str]]) -> list[str]:
    """What is wrong with the rows by themselves: in order of their sequence, from the first one.

    `charged` says whom each row charges, as it stands in the table of charges.
    """
    problems = []
    previous = GENESIS
    reserved: set[str] = set()
    for place, row in enumerate(rows, start=1):
        if row.sequence != place:
            problems.append(f"row {place} is missing, or rows were reordered")
            break
        if row.previous != previous:
            problems.append(f"row {place} does not follow the row before it")
        if row.hash != row.expected_hash():
            problems.append(f"row {place} was changed")
        whom = charged.get(place, ())
        if row.kind == "spend":
            if row.reservation not in reserved:
                problems.append(f"row {place} spends what was not reserved")
        else:
            reserved.add(row.reservation)
        if (len(whom), participants_hash(whom)) != (row.participants, row.participants_hash):
            problems.append(f"whom row {place} charges was changed")
        previous = row.hash
    stray = set(charged) - {row.sequence for row in rows}
    problems += [f"row {place} charges somebody and is missing" for place in sorted(stray)]
    return problems


def lost_rows(rows: Sequence[Row], recorded: Iterable[Recorded]) -> list[Recorded]:
    """What the log recorded and the ledger neither has nor has mended.

    Not empty after an older backup was restored, or after somebody cut the newest rows off or
    wrote the whole chain anew.
    """
    there = {row.hash for row in rows if row.hash == row.expected_hash()}
    mended = {row.lost for row in rows if row.kind == "mend"}
    missing = (one for one in recorded if one.hash not in there and one.name not in mended)
    # A mended row that was lost itself is mended again from what it stood for, by its own entry.
    return list({one.name: one for one in missing}.values())
