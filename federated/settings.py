"""The `[federated]` section of the configuration file.

Whose approvals count stands in the federation's own file (`federated.node.enrolment`), which
devices are given too, and not here: what an operator can edit must not be able to approve a study.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from keys.settings import Count, DatabaseURL, FilePath, Seconds


class BudgetSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What everything that is ever asked may cost each participant: ε at δ, over all studies.

    Devices have a budget of their own beside it; the smaller one counts.
    """

    epsilon: Annotated[float, msgspec.Meta(gt=0, le=16)] = 4.0
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1e-3)] = 1e-4


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long nodes are waited for, and how sure the error bars are."""

    greet_s: Seconds = 10.0
    stage_s: Seconds = 60.0
    level: Annotated[float, msgspec.Meta(gt=0.5, lt=1)] = 0.95


class FederatedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole section."""

    #: The federation of this machine: SuperLink, roster, nodes, `federation.json`.
    directory: FilePath = "var/federated"
    #: SQLAlchemy URL of studies, approvals and the ledger.
    database_url: DatabaseURL = "sqlite:///var/studies.sqlite3"
    #: 32 bytes, mode 0600: `havengate study key` makes it.
    coordinator_key_file: FilePath = "var/coordinator.key"
    #: Where answers and reports are written.
    reports_directory: FilePath = "var/reports"
    #: Who speaks for a site: login names, by site.
    officers: dict[str, tuple[str, ...]] = {}
    #: No study with a smaller one is taken, whatever it says.
    minimum_cohort: Count = 10
    budget: BudgetSettings = BudgetSettings()
    run: RunSettings = RunSettings()
