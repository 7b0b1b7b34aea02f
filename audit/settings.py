"""The `[audit]` section of the configuration file."""

from __future__ import annotations

import msgspec

from keys.settings import Count, DatabaseURL, FilePath, Seconds


class WitnessSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A witness that checkpoints are sent to. `verifier_key` is its C2SP verifier key text."""

    url: str
    verifier_key: str


class AuditSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole section."""

    #: Origin of the log (C2SP tlog-checkpoint), one per instance: a URL without scheme and
    #: trailing slash.
    origin: str = "havengate.internal/log/1"
    directory: FilePath = "var/audit"
    #: Socket on which worker processes hand their entries to the one writer.
    socket: FilePath = "var/audit.sock"
    #: Largest batch and longest queue, in entries and bytes; beyond the queue, appends are refused.
    max_batch: Count = 1024
    max_queue: Count = 8192
    publish_interval_s: Seconds = 1.0
    witnesses: tuple[WitnessSettings, ...] = ()
    witness_timeout_s: Seconds = 2.0
    #: 45 CFR 164.316(b)(2)(i): six years.
    retention_days: Count = 2192
    #: SQLAlchemy URL of the search index: disposable, rebuilt from the log.
    index_url: DatabaseURL = "sqlite:///var/audit-index.sqlite3"
