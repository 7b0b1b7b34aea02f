"""Whether a store is the newest there is: one mark in its file, the same in its keeper.

Each change that decides what may be read or spent (consent, state, withdrawal, cap, enrolment, what
was seen of the study log, an erasure, a cost) makes the next *generation*: a number, and a random
mark by which two copies that went their own ways differ. It is written in the change's own
transaction, and into the keeper right after the commit, before the lock is given up. So after a
crash the keeper is as new as the file or exactly one generation behind, and the next who looks
mends that; a file that is behind the keeper, or of another branch, is an older copy and refused.

What cannot be found so is a copy of *both*, file and keeper, put back together (a whole machine
restored); the coordinator's ledger, which counts the same, then still holds.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from federated.errors import LedgerError
from federated.node.database import Database
from federated.node.keeper import SecretKeeper

COUNTER_NAME: Final = "counter"
_META_NAME: Final = "generation"
_MARK_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generation:
    """`rows` and `link` are the head of the ledger at that time (`node.budget`)."""

    number: int
    mark: str
    rows: int
    link: str

    def text(self) -> str:
        return f"{self.number} {self.mark} {self.rows} {self.link}"


class Generations:
    """The generations of one store, whose lock every method takes."""

    def __init__(self, database: Database, keeper: SecretKeeper) -> None:
        self._database = database
        self._keeper = keeper

    def begin(self) -> None:
        """Give a new store its first."""
        with self._database.transaction():
            self._database.run("INSERT INTO meta VALUES (?, '')", [_META_NAME])
            self._write(_Generation(number=0, mark=_new_mark(), rows=0, link="-"), before="-")
            self._database.after_commit(self._keep)

    def verify(self) -> None:
        """Raise `LedgerError` if this is an older copy; take the keeper one step on after a crash.

        Also raised if the ledger's head is not in the ledger, or the keeper was emptied.
        """
        with self._database.transaction():
            here, before = self._in_file()
            kept = _parse(self._keeper.get(COUNTER_NAME))
            if here != kept:
                if here.number != kept.number + 1 or before != kept.mark:
                    raise LedgerError(
                        "This store is an older copy, or another one went on in its place: it has "
                        f"change {here.number}, and {kept.number} were made. What was spent, taken "
                        "back or withdrawn since is not known here, so nothing is answered any "
                        "more: put the newest copy back, or erase the store and start anew."
                    )
                self._keeper.set(COUNTER_NAME, here.text())
            self._verify_head(here)

    def advance(self) -> None:
        """Within a change's transaction: let it make the next one, once. Raises as `verify`."""
        with self._database.transaction():
            self.verify()
            # Written last, so that whoever verifies meanwhile compares what is committed.
            self._database.before_commit(self._step)
            self._database.after_commit(self._keep)

    def ledger_head(self) -> tuple[int, str]:
        """Number and link of the ledger's last row; 0 and a dash if it is empty."""
        last = self._database.one("SELECT number, link FROM spends ORDER BY number DESC LIMIT 1")
        return (0, "-") if last is None else (int(last[0]), str(last[1]))

    def _verify_head(self, here: _Generation) -> None:
        found = self._database.one("SELECT link FROM spends WHERE number = ?", [here.rows])
        if here.rows and (found is None or found[0] != here.link):
            raise LedgerError(
                f"Row {here.rows} of the node's ledger was changed or removed: nothing can be "
                "spent any more; put the newest copy back, or erase the store and start anew."
            )

    def _step(self) -> None:
        now, _ = self._in_file()
        rows, link = self.ledger_head()
        following = _Generation(number=now.number + 1, mark=_new_mark(), rows=rows, link=link)
        self._write(following, before=now.mark)

    def _keep(self) -> None:
        here, _ = self._in_file()
        self._keeper.set(COUNTER_NAME, here.text())

    def _write(self, generation: _Generation, *, before: str) -> None:
        self._database.run(
            "UPDATE meta SET value = ? WHERE name = ?",
            [f"{generation.text()} {before}", _META_NAME],
        )

    def _in_file(self) -> tuple[_Generation, str]:
        found = self._database.one("SELECT value FROM meta WHERE name = ?", [_META_NAME])
        text, _, before = ("" if found is None else str(found[0])).rpartition(" ")
        return _parse(text), before


def _new_mark() -> str:
    return secrets.token_hex(_MARK_BYTES)


def _parse(text: str | None) -> _Generation:
    number, mark, rows, link = ((text or "").split(" ") + [""] * 4)[:4]
    if not (number.isdecimal() and mark and rows.isdecimal() and link):
        raise LedgerError(
            "How many changes were made to this store is not known: its keeper was emptied, or it "
            "is damaged. Nothing is answered any more; erase the store and start anew."
        )
    return _Generation(number=int(number), mark=mark, rows=int(rows), link=link)
