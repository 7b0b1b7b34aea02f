"""The story that entries tell: exchanges that never ended, time that ran back.

Pure; looks at the few fields of an entry that pair it with others, and at none of its content.

Before: `audit.verify` hands in entries in the order of the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

#: Exchanges open at a time that are followed; a log with more in flight is told to be so.
MAX_OPEN = 200_000
#: Findings of a kind that are listed; the rest is counted.
MAX_LISTED = 1000
#: Callers take the time before their entry gets its place: this much out of order is normal.
TOLERANCE_US = 1_000_000

_BEGINS = {"intent": "outcome", "opened": "closed"}
_ENDS = {"outcome": "intent", "closed": "opened"}


class Head(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The fields of an entry that pair it with others; the rest is not read."""

    stage: str
    request: str
    time: int
    part: int | None = None
    parts: int | None = None


decode_head = msgspec.json.Decoder(Head).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Dangling:
    """An exchange that was announced at `index` and whose end is not in the log.

    Or that was announced while another of the same id was open, so that ends cannot be told apart.
    """

    index: int
    request: str
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """An entry whose time lies `back_us` microseconds before one that stands above it."""

    index: int
    back_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What was found. Lists are cut at `MAX_LISTED`; counts are whole."""

    dangling: Sequence[Dangling]
    dangling_count: int
    orphans: Sequence[Dangling]
    orphan_count: int
    regressions: Sequence[Regression]
    regression_count: int
    untracked: int


class Pairing:
    """Follows the entries of a log."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], int] = {}
        self._parts: dict[tuple[str, str], int] = {}
        self._latest_us = 0
        self._again: list[Dangling] = []
        self._again_count = 0
        self._orphans: list[Dangling] = []
        self._orphan_count = 0
        self._regressions: list[Regression] = []
        self._regression_count = 0
        self._untracked = 0

    def see(self, index: int, head: Head) -> None:
        """Take the next entry."""
        if head.time >= self._latest_us:
            self._latest_us = head.time
        elif head.time < self._latest_us - TOLERANCE_US:
            self._regression_count += 1
            if len(self._regressions) < MAX_LISTED:
                back_us = self._latest_us - head.time
                self._regressions.append(Regression(index=index, back_us=back_us))
        if head.stage in _BEGINS:
            self._begin(index, head)
        elif head.stage in _ENDS:
            self._end(index, head)

    def _begin(self, index: int, head: Head) -> None:
        key = (head.stage, head.request)
        if key in self._open:
            # Two under one id: one outcome must not end both. Further parts are no second one.
            if head.part in {None, 1}:
                self._again_count += 1
                if len(self._again) < MAX_LISTED:
                    again = Dangling(index=index, request=head.request, stage=head.stage)
                    self._again.append(again)
        elif len(self._open) < MAX_OPEN:
            self._open[key] = index
        else:
            self._untracked += 1

    def _end(self, index: int, head: Head) -> None:
        key = (_ENDS[head.stage], head.request)
        if head.parts is not None:
            seen = self._parts.get(key, 0) + 1
            if seen < head.parts and (seen > 1 or len(self._parts) < MAX_OPEN):
                # Some parts only: the exchange counts as not ended.
                self._parts[key] = seen
                return
            self._parts.pop(key, None)
        if self._open.pop(key, None) is None:
            self._orphan_count += 1
            if len(self._orphans) < MAX_LISTED:
                dangling = Dangling(index=index, request=head.request, stage=head.stage)
                self._orphans.append(dangling)

    def story(self) -> Story:
        """What was found so far."""
        dangling = [
            Dangling(index=index, request=request, stage=stage)
            for (stage, request), index in list(self._open.items())[:MAX_LISTED]
        ]
        return Story(
            dangling=[*dangling, *self._again][:MAX_LISTED],
            dangling_count=len(self._open) + self._again_count,
            orphans=self._orphans,
            orphan_count=self._orphan_count,
            regressions=self._regressions,
            regression_count=self._regression_count,
            untracked=self._untracked,
        )
