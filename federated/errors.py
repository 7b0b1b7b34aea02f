"""What can go wrong, by who must act. Messages say what was expected, what came, and what to do.

No message, and no `diagnostics()`, ever holds a person's data, a key or a share of one.
"""

from __future__ import annotations


class FederatedError(Exception):
    """Base of everything that this package raises."""

    code = "federated.error"

    def diagnostics(self) -> dict[str, str]:
        """Fields for the operational log."""
        return {"code": self.code, "error": type(self).__name__, "message": str(self)}


class ManifestError(FederatedError):
    """A study's declaration is malformed, incomplete or promises what cannot be kept."""

    code = "federated.manifest"


class ApprovalError(FederatedError):
    """An approval is missing, stale, not by somebody who may, or not by a second person."""

    code = "federated.approval"


class StudyLogError(FederatedError):
    """That a study was published is not proven, or not yet: nothing of it may run."""

    code = "federated.study_log"


class BudgetExhaustedError(FederatedError):
    """Going on would spend more than somebody's budget. Nothing was reserved."""

    code = "federated.budget_exhausted"


class LedgerError(FederatedError):
    """The ledger cannot be read, written or believed. Nothing may be dispatched."""

    code = "federated.ledger"


class AccountingError(FederatedError):
    """A privacy cost cannot be computed, so it counts as unbounded."""

    code = "federated.accounting"


class ProtocolError(FederatedError):
    """A peer of secure aggregation did what an honest one does not. The round ends here."""

    code = "federated.protocol"


class CohortError(FederatedError):
    """Fewer take part than the study's minimum, or survived to the end."""

    code = "federated.cohort"


class StoreError(FederatedError):
    """A device's store cannot be opened, read or written; what was there is as before."""

    code = "federated.store"


class CheckpointError(FederatedError):
    """A training's saved state is damaged or another study's. Resume from the one before."""

    code = "federated.checkpoint"


class ImportDataError(FederatedError):
    """A file is not what its format says. Nothing of it was kept, unless the message says so."""

    code = "federated.import"


class RefusedError(FederatedError):
    """A device's guard refused before a row was read. `reason` is for the person's receipt."""

    code = "federated.refused"

    def __init__(self, reason: str, *, rule: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rule = rule


class DeploymentError(FederatedError):
    """A process of the deployment did not start, ended, or cannot be reached."""

    code = "federated.deployment"


class RunEndedError(FederatedError):
    """A run was interrupted, or ended by what nobody foresaw. What was reserved stays spent."""

    code = "federated.run_ended"
