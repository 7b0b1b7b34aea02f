"""Errors of the program itself: its configuration file and its command line."""

from __future__ import annotations

#: Exit code after Ctrl-C, as a shell reports SIGINT.
INTERRUPTED = 130


class ConfigurationError(Exception):
    """The configuration file, or the environment on top of it, is wrong. The operator must act."""

    code = "configuration"

    def diagnostics(self) -> dict[str, str]:
        """The code and the message; values of settings are never part of it."""
        return {"code": self.code, "message": str(self)}
