"""Errors of `policies`, grouped by who must act.

A denial is a value (`policies.model.Denied`), not an exception: nothing here is raised while a
request is decided. Every error carries a stable `code`, a message that says what was expected, what
was found and what to do next, and `diagnostics()`. None carries a person's identity or content.
"""

from __future__ import annotations


class PoliciesError(Exception):
    """Anything that `policies` refuses. None of them ever means "go on without a decision"."""

    code = "policies.error"

    def diagnostics(self) -> dict[str, str | int | float | bool]:
        """What an operator may see and a log may keep."""
        return {"code": self.code, "message": str(self)}


# --- The caller must act -------------------------------------------------------------------------


class MalformedRequestError(PoliciesError):
    """A request to decide, from a file, that does not say what a request must say."""

    code = "policies.request_malformed"


class UnlabelledContentError(PoliciesError):
    """Content too deep or too large to be labelled: treat it as not releasable."""

    code = "policies.content_unlabelled"


# --- The operator must act -----------------------------------------------------------------------


class PolicyConfigurationError(PoliciesError):
    """A setting, or a directory that a setting names, is wrong."""

    code = "policies.configuration"


class BundleError(PoliciesError):
    """A rule, schema or table that does not load. `where` names file and line."""

    code = "policies.bundle_invalid"

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where


class CaseError(PoliciesError):
    """A file of test cases that cannot be read as such."""

    code = "policies.case_malformed"


class RecordsUnavailableError(PoliciesError):
    """The recorded decisions to replay cannot be read."""

    code = "policies.records_unavailable"
