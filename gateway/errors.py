"""Errors of `gateway`, grouped by who must act.

Every error carries a stable `code`, a message that says what was expected, what was found and what
to do next, and `diagnostics()` for logs. None of them ever carries personal data, tokens, bodies or
the query of a URL. A denial is a value (`policies.model.Denied`), not an exception.
"""

from __future__ import annotations


class GatewayError(Exception):
    """Anything that the gateway refuses or cannot do. None ever means "let it through"."""

    code = "gateway.error"
    #: Whether the same call may succeed later without anybody acting.
    retryable = False

    def diagnostics(self) -> dict[str, str | int | float | bool]:
        """What an operator may see and a log may keep."""
        return {"code": self.code, "message": str(self), "retryable": self.retryable}


# --- The caller must act: `status` is what the client is told ------------------------------------


class BadRequestError(GatewayError):
    """A request that cannot be understood, or that two readers could understand differently."""

    code = "gateway.bad_request"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class UnsupportedError(BadRequestError):
    """A well-formed request for something that this gateway does not let anybody do."""

    code = "gateway.unsupported"

    def __init__(self, message: str, *, status: int = 422) -> None:
        super().__init__(message, status=status)


# --- The app behind is at fault -------------------------------------------------------------------


class UpstreamError(GatewayError):
    """The app did not answer, or what it answered cannot be released."""

    code = "gateway.upstream"
    status = 502


class UpstreamTimeoutError(UpstreamError):
    """The app did not answer in time."""

    code = "gateway.upstream_timeout"
    status = 504
    retryable = True


class UpstreamContentError(UpstreamError):
    """The app's answer is not what it says it is, too large, or cannot be protected."""

    code = "gateway.upstream_content"


# --- The gateway's own parts are down -------------------------------------------------------------


class UnavailableError(GatewayError):
    """Keys, log, directory or facts cannot be had: nothing is released. `code` says which."""

    code = "gateway.unavailable"
    status = 503
    retryable = True

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class NotAtHandError(UnavailableError):
    """A pure step needs what is not in memory: load it, and begin the step anew.

    `name` is the purpose and person of a pseudonym; None stands for the keys of the blind index.
    """

    code = "gateway.keys_not_at_hand"

    def __init__(self, name: tuple[str, str] | None = None) -> None:
        super().__init__("Keys that are needed are not in memory.")
        self.name = name


# --- The operator must act ------------------------------------------------------------------------


class GatewayConfigurationError(GatewayError):
    """A setting, file or permission is wrong."""

    code = "gateway.configuration"


class DirectoryError(GatewayError):
    """The database of accounts and sessions cannot be read or written."""

    code = "gateway.directory"
    retryable = True


class AccountError(GatewayError):
    """An account that does not exist, exists already, or whose details are not acceptable."""

    code = "gateway.account"
