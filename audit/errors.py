"""Errors of `audit`, grouped by who must act.

Every error carries a stable `code`, a message that says what was expected, what was found and what
to do next, and `diagnostics()` for logs. None carries the content of an entry.
"""

from __future__ import annotations


class AuditError(Exception):
    """Anything that the audit log refuses or cannot do.

    An error from an append means: release nothing.
    """

    code = "audit.error"

    def diagnostics(self) -> dict[str, str | int | float | bool]:
        """What an operator may see and a log may keep."""
        return {"code": self.code, "message": str(self)}


# --- The caller must act -------------------------------------------------------------------------


class MalformedEntryError(AuditError):
    """Bytes or fields that are not a valid entry, or one that is larger than 65,535 bytes."""

    code = "audit.entry_malformed"


class MalformedNoteError(AuditError):
    """Bytes that are not a signed note, checkpoint, cosignature or proof."""

    code = "audit.note_malformed"


class MalformedQueryError(AuditError):
    """A search that cannot be asked: a word, time or combination that the log does not know."""

    code = "audit.query_malformed"


# --- The operator must act -----------------------------------------------------------------------


class AuditConfigurationError(AuditError):
    """A setting, file or permission is wrong."""

    code = "audit.configuration"


class IndexUnavailableError(AuditError):
    """The search index cannot be read or written. It is disposable: rebuild it from the log."""

    code = "audit.index_unavailable"


class RetentionError(AuditError):
    """Pruning was refused, because the clock or the log does not look right."""

    code = "audit.retention_refused"


class LogUnavailableError(AuditError):
    """The entry was not acknowledged and must be taken as not written: release nothing."""

    code = "audit.log_unavailable"


class LogFullError(LogUnavailableError):
    """The disk that holds the log is full. Nothing is lost; appends go on once there is room."""

    code = "audit.log_full"


class LogTamperedError(LogUnavailableError):
    """The log's files are not what the writer left: unlinked, renamed, truncated or replaced."""

    code = "audit.log_tampered"


class LogLockedError(LogUnavailableError):
    """Another writer holds this log."""

    code = "audit.log_locked"


# --- Somebody has changed history ----------------------------------------------------------------


class VerificationError(AuditError):
    """A proof, signature, tile or entry does not fit the checkpoint."""

    code = "audit.verification_failed"


# --- Upstream is at fault ------------------------------------------------------------------------


class WitnessError(AuditError):
    """A witness is out of reach or refused a checkpoint."""

    code = "audit.witness"
