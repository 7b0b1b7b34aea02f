"""The rules and tables in force, and how new ones take their place between two requests.

Before: settings and folders. After: whoever decides takes `store.current` once per request and uses
that one throughout, so that no request is decided half by old and half by new rules.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from policies import tables
from policies.bundle import load
from policies.engine import Engine
from policies.errors import BundleError, PoliciesError
from policies.labels import Labeller
from policies.settings import PoliciesSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """One set of rules with one set of tables. Each has its own SHA-256."""

    engine: Engine = field(repr=False)
    labeller: Labeller = field(repr=False)
    hash: str
    tables_hash: str


def load_in_force(settings: PoliciesSettings) -> InForce:
    """Read everything that `settings` name. Raises a `PoliciesError` for the first mistake."""
    own_rules = [Path(settings.directory)] if settings.directory else []
    own_tables = [Path(settings.tables_directory)] if settings.tables_directory else []
    bundle = load(own_rules, roles=settings.roles)
    tables_hash = _hash([tables.BUILT_IN, *own_tables])
    labeller = Labeller(
        tables.load_tables(own_tables),
        substance_use_is_part_2=settings.substance_use_is_part_2,
        max_values=settings.max_values,
    )
    if _hash([tables.BUILT_IN, *own_tables]) != tables_hash:
        # The hash would name, and the log would keep, tables that are not in force.
        raise BundleError("tables", "changed while they were read; load them again.")
    return InForce(
        engine=Engine(bundle, deadline_s=settings.deadline_s),
        labeller=labeller,
        hash=bundle.hash,
        tables_hash=tables_hash,
    )


def _hash(folders: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.toml")):
            digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


class PolicyStore:
    """Holds what is in force. `last_error` is the refusal of the latest reload, or nothing.

    Construction raises a `PoliciesError` if the rules do not load: nothing starts without rules.
    """

    def __init__(self, settings: PoliciesSettings) -> None:
        self._settings = settings
        # Of two reloads at once the one that read last must win.
        self._reloading = threading.Lock()
        self._current = load_in_force(settings)
        self.last_error: PoliciesError | None = None

    @property
    def current(self) -> InForce:
        """What is in force now."""
        return self._current

    def reload(self) -> bool:
        """Put what the folders hold now into force; True if it differs from before.

        All or nothing: raises a `PoliciesError` and leaves the old in force if anything is wrong.
        Takes some 100 ms of CPU: call it from a thread, not between two awaits.
        """
        with self._reloading:
            try:
                loaded = load_in_force(self._settings)
            except PoliciesError as error:
                self.last_error = error
                raise
            before, self._current = self._current, loaded
            self.last_error = None
        return (before.hash, before.tables_hash) != (loaded.hash, loaded.tables_hash)
