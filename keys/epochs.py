"""Epochs of the key-encryption key: roll, rewrap, trim, and the check that everything still opens.

A roll begins a new epoch; rewrapping moves every wrapped key to it inside the key server; trimming
destroys old epochs, and with them whatever old backups of the key table hold. Each step is recorded
before it is taken, may be interrupted anywhere, and goes on while fields are sealed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from keys.errors import KeyConfigurationError, KeyTableError, VaultRejectedError
from keys.model import CheckReport, EpochStatus, KeyRow, RotationReport, TrimReport
from keys.ports import Clock, KeyEvent, KeyEventRecorder, KeyWrapper
from keys.settings import EpochSettings
from keys.store import KeyStore, wrapped_key
from keys.table import KeyTable, Rewrapped

DAY_S = 86_400.0
#: One call of the key server.
BATCH = 200
#: Keys may be stored late while a trim moves the others; each pass finds fewer.
_FENCE_ATTEMPTS = 5

Action = Literal["keys.epoch.roll", "keys.epoch.rewrap", "keys.epoch.trim"]


class EpochKeeper:
    """Keeps epochs on schedule.

    `operator` rolls, rewraps and trims; it needs no right to open a key. `check` opens keys with
    the store's own wrapper. Every method raises `VaultError` or `KeyTableError`, or what the
    recorder raises, in which case the step was not taken.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        operator: KeyWrapper,
        settings: EpochSettings,
        recorder: KeyEventRecorder,
    ) -> None:
        self._store = store
        self._table: KeyTable = store.table
        self._operator = operator
        self._clock: Clock = store.clock
        self._settings = settings
        self._recorder = recorder

    def rotate(
        self, *, actor: str, progress: Callable[[int], None] | None = None
    ) -> RotationReport:
        """Begin a new epoch and move every key to it. `progress` is told how many have been moved.

        If an earlier rotation was interrupted, that one is finished and no further epoch begun.
        """
        _, current = self._operator.epochs()
        _, rewrapped_at = self._note_current(current)[current]
        resumed = rewrapped_at is None
        if not resumed:
            with self._recorded("keys.epoch.roll", actor, {"from_epoch": current}) as outcome:
                current = self._operator.roll()
                outcome["epoch"] = current
            self._note_current(current)
        moved = self._rewrap(current, actor=actor, progress=progress)
        return RotationReport(epoch=current, rewrapped=moved, resumed=resumed)

    def trim(self, *, actor: str, oldest: int | None = None) -> TrimReport:
        """Destroy for good what was superseded `trim_after_days` ago, or all before `oldest`.

        Keys still wrapped by one of those epochs are moved first; should one remain, nothing is
        destroyed and `KeyTableError` raised. After this, a backup of the key table from before the
        last rotation holds no key that opens.
        """
        first, current = self._operator.epochs()
        self._note_current(current)
        target = self._due_oldest(first, current) if oldest is None else oldest
        if target > current:
            raise KeyConfigurationError(
                f"expected to keep an epoch of at most {current}, got {target}; roll first, then "
                "trim"
            )
        if target <= first:
            return TrimReport(oldest=first, trimmed=0)
        with self._recorded("keys.epoch.trim", actor, {"oldest": target}) as outcome:
            self._fence(target, current, actor)
            self._operator.trim(target)
            outcome["trimmed"] = target - first
        return TrimReport(oldest=target, trimmed=target - first)

    def status(self) -> EpochStatus:
        """Return counts and due dates."""
        first, current = self._operator.epochs()
        known = self._note_current(current)
        now = self._clock()
        by_kind, by_epoch, erased = self._table.counts()
        roll_due_at = known[current][0] + self._settings.roll_every_days * DAY_S
        trim_due_at = None if first == current else self._trim_due_at(first, current, known)
        overdue: list[Literal["roll", "rewrap", "trim"]] = []
        if now >= roll_due_at:
            overdue.append("roll")
        if any(epoch < current for epoch in by_epoch):
            overdue.append("rewrap")
        if trim_due_at is not None and now >= trim_due_at:
            overdue.append("trim")
        return EpochStatus(
            oldest_epoch=first,
            current_epoch=current,
            keys=by_kind,
            keys_by_epoch=by_epoch,
            erased_keys=erased,
            roll_due_at=roll_due_at,
            trim_due_at=trim_due_at,
            overdue=tuple(overdue),
        )

    def check(self, *, progress: Callable[[int], None] | None = None) -> CheckReport:
        """Open every wrapped key once and drop it. `progress` is told how many were tried."""
        status = self.status()
        checked = 0
        broken: list[str] = []
        below: list[str] = []
        for rows in self._pages(below_epoch=None):
            broken += self._broken(rows)
            below += [row.key_id for row in rows if (row.epoch or 0) < status.oldest_epoch]
            checked += len(rows)
            if progress is not None:
                progress(checked)
        return CheckReport(
            status=status,
            checked=checked,
            broken=tuple(broken),
            below_oldest=tuple(below),
            unfinished_erasures=self._table.unfinished_erasures(),
        )

    def all_dead_by(self) -> float:
        """Return when the last copy of a key that is destroyed now will be dead, as Unix time.

        Every copy is wrapped by the current epoch or an older one. The current one ends at the next
        roll, is destroyed `trim_after_days` later, and survives in backups of the key server for
        another `server_backup_days`. Backups of the key table may be kept for ever.
        """
        _, current = self._operator.epochs()
        began_at, _ = self._note_current(current)[current]
        next_roll = max(self._clock(), began_at + self._settings.roll_every_days * DAY_S)
        wait_days = self._settings.trim_after_days + self._settings.server_backup_days
        return next_roll + wait_days * DAY_S

    def _fence(self, target: int, current: int, actor: str) -> None:
        """Move what is still wrapped by older epochs, and let nothing more be stored under them."""
        for _ in range(_FENCE_ATTEMPTS):
            in_the_way = self._table.fence(target)
            if in_the_way == 0:
                return
            # Left behind by an interrupted rotation, or stored late by a process that wrapped
            # early.
            self._rewrap(current, actor=actor)
        raise KeyTableError(
            f"expected no key to be wrapped by an epoch before {target}, got {in_the_way}; "
            "run `havengate keys check`, repair or erase the keys it names, then trim again"
        )

    # --- Rewrapping -------------------------------------------------------------------------------

    def _rewrap(
        self, current: int, *, actor: str, progress: Callable[[int], None] | None = None
    ) -> int:
        """Move every live key to the current epoch.

        Keys that do not open are left where they are.
        """
        moved = 0
        stuck = 0
        with self._recorded("keys.epoch.rewrap", actor, {"epoch": current}) as outcome:
            for rows in self._pages(below_epoch=current):
                done, failed = self._rewrap_page(rows)
                moved += done
                stuck += failed
                if progress is not None:
                    progress(moved)
            outcome.update(rewrapped=moved, stuck=stuck)
        # Stuck keys keep `trim` from destroying their epoch, but not `rotate` from going on.
        self._table.note_rewrapped(current, now=self._clock())
        self._store.empty()
        return moved

    def _rewrap_page(self, rows: list[KeyRow]) -> tuple[int, int]:
        try:
            fresh = self._operator.rewrap([wrapped_key(row) for row in rows])
        except VaultRejectedError:
            if len(rows) == 1:
                return 0, 1
            # One bad row must not keep the others in an epoch that is to be destroyed.
            parts = [self._rewrap_page([row]) for row in rows]
            return sum(done for done, _ in parts), sum(failed for _, failed in parts)
        changes = [
            Rewrapped(key_id=row.key_id, old=row.wrapped or "", new=item.text, epoch=item.epoch)
            for row, item in zip(rows, fresh, strict=True)
        ]
        return self._table.replace(changes), 0

    def _broken(self, rows: list[KeyRow]) -> list[str]:
        try:
            self._store.wrapper.unwrap([wrapped_key(row) for row in rows])
        except VaultRejectedError:
            if len(rows) > 1:
                half = len(rows) // 2
                return self._broken(rows[:half]) + self._broken(rows[half:])
            now = self._table.by_ids([rows[0].key_id])[rows[0].key_id]
            if now.erased_at is not None:
                return []
            # Moved by a rotation since the page was read: what counts is what is there now.
            return [now.key_id] if now.wrapped == rows[0].wrapped else self._broken([now])
        return []

    def _pages(self, *, below_epoch: int | None) -> Iterator[list[KeyRow]]:
        after = ""
        while rows := self._table.page(after=after, limit=BATCH, below_epoch=below_epoch):
            yield rows
            after = rows[-1].key_id

    # --- Dates ------------------------------------------------------------------------------------

    def _note_current(self, current: int) -> dict[int, tuple[float, float | None]]:
        """Return when epochs began and were reached; the current one is among them.

        One that was begun elsewhere counts from now: later than it was, never earlier.
        """
        known = self._table.epochs()
        if current not in known:
            now = self._clock()
            self._table.note_epoch(current, now=now)
            if not known:
                # The first epoch that this table sees: nothing was there to be moved to it.
                self._table.note_rewrapped(current, now=now)
            known = self._table.epochs()
        return known

    def _due_oldest(self, first: int, current: int) -> int:
        known = self._table.epochs()
        oldest = first
        while oldest < current and self._clock() >= self._trim_due_at(oldest, current, known):
            oldest += 1
        return oldest

    def _trim_due_at(
        self, epoch: int, current: int, known: Mapping[int, tuple[float, float | None]]
    ) -> float:
        """Return when `epoch`, no longer current, may go: counted from when its successor began."""
        successor = next(known[e][0] for e in range(epoch + 1, current + 1) if e in known)
        return successor + self._settings.trim_after_days * DAY_S

    # --- Records ----------------------------------------------------------------------------------

    @contextmanager
    def _recorded(
        self, action: Action, actor: str, detail: dict[str, str | int]
    ) -> Iterator[dict[str, str | int]]:
        """Record the intent, run the block, record the outcome. Yields the outcome's detail."""
        request_id = secrets.token_hex(16)
        outcome = dict(detail)

        def record(stage: Literal["intent", "outcome"], *, succeeded: bool | None) -> None:
            event = KeyEvent(
                action=action,
                stage=stage,
                request_id=request_id,
                tenant="",
                actor=actor,
                succeeded=succeeded,
                detail=outcome,
            )
            self._recorder.record(event)

        record("intent", succeeded=None)
        try:
            yield outcome
        except Exception as error:
            outcome["error"] = getattr(error, "code", type(error).__name__)
            record("outcome", succeeded=False)
            raise
        record("outcome", succeeded=True)
