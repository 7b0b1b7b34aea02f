"""Retention: entries older than the policy go, and everything that remains stays provable.

Lives here: which entries may go, what has to be true of the clock before any does, and the order in
which it happens. Comes after: `audit.reader`. `audit.verify` takes `retained_from` from here.

Only whole bundles below a boundary are removed, and journal segments that hold nothing else. Tiles
stay: proofs of the rest, and even of a removed entry that somebody still holds, remain valid. First
an entry `log.prune` with its boundary is sequenced and *published*, then bundles go, oldest first;
a crash in between is finished by the next run. What a run removes is bounded by its own look at the
log and the clock, never by what an entry says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from audit.entry import parse_entry, parse_head
from audit.errors import AuditError, LogUnavailableError, RetentionError, VerificationError
from audit.files import sync_directory
from audit.integrate import read_state
from audit.journal import remove_segments
from audit.recorder import log_entry
from audit.tiles import TILE_WIDTH, bundle_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from audit.recorder import Appender

#: 45 CFR 164.316(b)(2)(i): six years. Less has to be asked for by name.
SIX_YEARS_DAYS: Final = 2192
#: The newest entry may be this far in the future: clocks of a cluster differ a little.
FUTURE_TOLERANCE_S: Final = 300
#: A log in use does not stay silent for longer. If it did, the clock may have jumped.
LONGEST_SILENCE_DAYS: Final = 30
#: The cutoff moves with the clock; a day covers a changed hour of the nightly run.
_CUTOFF_TOLERANCE_US: Final = 86_400 * 1_000_000
_DAY_US: Final = 86_400 * 1_000_000
_PRUNE: Final = b'"action":"log.prune"'
_POLL_S: Final = 0.1


class PrunableLog(Protocol):
    """A log's directory that can be read; `audit.reader.LogReader` is one."""

    directory: Path

    def size(self) -> int:
        """How many entries there are."""
        ...

    def published_size(self) -> int:
        """How many entries the published checkpoint covers."""
        ...

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Index and bytes, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What would be removed: entries in [`first`, `retained_from`), a multiple of 256.

    `marked` says that an entry `log.prune` of this or a later boundary is in the log already, at
    index `mark`: an earlier run was interrupted. Times are Unix microseconds.
    """

    first: int
    retained_from: int
    cutoff_us: int
    mark: int | None

    @property
    def count(self) -> int:
        """How many entries would be removed."""
        return self.retained_from - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    index: int
    time_us: int
    retained_from: int
    cutoff_us: int


def first_kept(directory: Path) -> int:
    """Return the index of the first entry whose bundle is there, whyever those before it are not.

    One by one: a search by halves would take a bundle lost in the middle for the beginning.
    """
    state = read_state(directory)
    bundles = 0 if state is None else state.size // TILE_WIDTH
    there = (number for number in range(bundles) if (directory / bundle_path(number)).exists())
    return next(there, bundles) * TILE_WIDTH


def first_readable(log: PrunableLog, *, now_s: float, retention_days: int) -> int:
    """Return `first_kept`, once it is sure that what is missing before it was pruned.

    For whoever reads the whole log and must not miss the beginning unawares. Raises
    `VerificationError`.
    """
    first = first_kept(log.directory)
    if first and first > retained_from(log, now_s=now_s, retention_days=retention_days):
        raise VerificationError(
            f"The entries before {first} are missing, and that is no retention: no published entry "
            f"of the log announces it, or what follows is younger than {retention_days} days. "
            "Run havengate audit verify; restore tile/entries from a backup."
        )
    return first


def retained_from(log: PrunableLog, *, now_s: float, retention_days: int) -> int:
    """Return the boundary below which entries may be missing because of their age; 0 if none may.

    The log has to say so in a *published* entry, and the first entry that is left has to be older
    than `retention_days` by the caller's clock: so whoever can write to the log cannot pass the
    removal of younger entries off as retention. Missing entries above the boundary are a loss
    (`audit.verify`). Damaged bundles are passed over: whoever verifies the log finds them.
    """
    cutoff_us = int(now_s * 1_000_000) - retention_days * _DAY_US
    boundary = 0
    published = log.published_size()
    for start in range(first_kept(log.directory), published, TILE_WIDTH):
        try:
            for mark in _marks(log.read(start, min(start + TILE_WIDTH, published))):
                if mark.retained_from > boundary and _is_old(log, mark, cutoff_us):
                    boundary = mark.retained_from
        except AuditError:
            continue
    return boundary


def _is_old(log: PrunableLog, mark: _Mark, cutoff_us: int) -> bool:
    """Whether the first entry that a pruning left is old enough for all before it to go."""
    first = mark.retained_from
    return first <= mark.index and any(
        parse_head(raw).time < cutoff_us for _, raw in log.read(first, first + 1)
    )


def plan_prune(
    log: PrunableLog,
    *,
    retention_days: int,
    now_s: float,
    shorter: bool = False,
    silences: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
) -> PrunePlan:
    """Look at the whole log and say what may go. Changes nothing.

    Raises `RetentionError` if less than six years are kept without `shorter`, or if the clock looks
    wrong: the newest entry is in the future, the log was silent for a month, or the cutoff moved
    further than time did. `silences` are the indices of entries after which a silence is known to
    be real.
    """
    if retention_days < SIX_YEARS_DAYS and not shorter:
        raise RetentionError(
            f"[audit] retention_days is {retention_days}; HIPAA asks for six years "
            f"({SIX_YEARS_DAYS} days). If another law asks for less, say --shorter-than-six-years."
        )
    now_us = int(now_s * 1_000_000)
    cutoff_us = now_us - retention_days * _DAY_US
    first = first_kept(log.directory)
    clock = _Clock(silences)
    boundary: int | None = None
    marks: list[_Mark] = []
    for index, raw in log.read(first):
        if progress is not None and index % 4096 == 0:
            progress(index)
        time_us = parse_head(raw).time
        clock.see(index, time_us)
        if boundary is None and time_us >= cutoff_us:
            boundary = index
        marks += _marks([(index, raw)])
    clock.finish(now_us)
    if not shorter:
        _check_cutoff(marks, cutoff_us, now_us)
    # The newest bundle always stays: it holds what says how far pruning went.
    last_bundle = max(first, (log.size() - 1) // TILE_WIDTH * TILE_WIDTH)
    # The first entry that is kept is older than the cutoff: it shows that none younger went.
    keep = last_bundle if boundary is None else min(max(0, boundary - 1), last_bundle)
    keep = max(first, keep // TILE_WIDTH * TILE_WIDTH)
    covering = (mark.index for mark in marks if mark.retained_from >= keep)
    return PrunePlan(
        first=first, retained_from=keep, cutoff_us=cutoff_us, mark=next(covering, None)
    )


def prune(
    plan: PrunePlan,
    log: PrunableLog,
    appender: Appender,
    *,
    now_s: float,
    publish_timeout_s: float = 30.0,
) -> int:
    """Do what the plan says; return how many entries were removed. May be repeated after a crash.

    Nothing is removed before the entry that says so is published. Raises `LogUnavailableError` if
    that does not happen in time: the next run goes on from there.
    """
    if plan.count == 0:
        return 0
    mark = plan.mark
    if mark is None:
        counts = {
            "cutoff_us": plan.cutoff_us,
            "entries": plan.count,
            "retained_from": plan.retained_from,
        }
        entry = log_entry("log.prune", time_s=now_s, request=str(uuid.uuid4()), counts=counts)
        mark = appender.append(entry).index
    _await_published(log, mark, publish_timeout_s)
    for number in range(plan.first // TILE_WIDTH, plan.retained_from // TILE_WIDTH):
        _remove_bundle(log.directory / bundle_path(number))
    remove_segments(log.directory, before=plan.retained_from)
    return plan.count


class _Clock:
    """Looks for jumps of the clock in the times of entries."""

    def __init__(self, silences: Collection[int]) -> None:
        self._silences = silences
        self._latest: tuple[int, int] | None = None

    def see(self, index: int, time_us: int) -> None:
        """Take the next entry. Raises `RetentionError` after a long silence."""
        if self._latest is None or time_us > self._latest[1]:
            self._check(time_us)
            self._latest = index, time_us

    def finish(self, now_us: int) -> None:
        """Compare with the clock as it is now."""
        if self._latest is None:
            return
        index, latest_us = self._latest
        if latest_us > now_us + FUTURE_TOLERANCE_S * 1_000_000:
            raise RetentionError(
                f"Entry {index} is {(latest_us - now_us) // 1_000_000} s in the future: this clock "
                "or the one that wrote it is wrong. Set it right first; nothing was pruned."
            )
        self._check(now_us)

    def _check(self, next_us: int) -> None:
        if self._latest is None:
            return
        index, latest_us = self._latest
        days = (next_us - latest_us) // _DAY_US
        if days >= LONGEST_SILENCE_DAYS and index not in self._silences:
            raise RetentionError(
                f"After entry {index} come {days} days without an entry: the clock may have "
                f"jumped. If they were really silent, say --silence {index}; nothing was pruned."
            )


def _check_cutoff(marks: Collection[_Mark], cutoff_us: int, now_us: int) -> None:
    """See that the cutoff moved no further than time did since the last pruning."""
    if not marks:
        return
    last = max(marks, key=lambda mark: mark.index)
    moved_us, passed_us = cutoff_us - last.cutoff_us, now_us - last.time_us
    if moved_us > passed_us + _CUTOFF_TOLERANCE_US:
        raise RetentionError(
            f"The cutoff would move by {moved_us // _DAY_US} days, but only {passed_us // _DAY_US} "
            "have passed since the last pruning: clock or policy changed. See [audit] "
            "retention_days; if it is meant, say --shorter-than-six-years."
        )


def _marks(source: Collection[tuple[int, bytes]] | Iterator[tuple[int, bytes]]) -> Iterator[_Mark]:
    for index, raw in source:
        if _PRUNE not in raw:
            continue
        entry = parse_entry(raw)
        boundary = entry.counts.get("retained_from")
        if (entry.stage, entry.action) == ("log", "log.prune") and boundary is not None:
            yield _Mark(
                index=index,
                time_us=entry.time,
                retained_from=boundary,
                cutoff_us=entry.counts.get("cutoff_us", 0),
            )


def _await_published(log: PrunableLog, index: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while log.published_size() <= index:
        if time.monotonic() > deadline:
            raise LogUnavailableError(
                f"Entry {index}, which announces the pruning, was not published within "
                f"{timeout_s:g} s; nothing was removed. See that the key server can sign, then "
                "repeat the command."
            )
        time.sleep(_POLL_S)


def _remove_bundle(path: Path) -> None:
    """Remove a full bundle and what is left of its partial ones."""
    partial = path.with_name(f"{path.name}.p")
    if partial.is_dir():
        for leftover in partial.iterdir():
            leftover.unlink()
        partial.rmdir()
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_directory(path.parent)
