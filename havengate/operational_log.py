"""The operational log: what happens to the program. It is not the audit log, and names nobody."""

from __future__ import annotations

import sys

import structlog


def configure() -> None:
    """JSON lines on standard error, or readable ones on a terminal.

    Tracebacks are plain: the usual ones show local variables, and those are tokens and keys.
    """
    renderers: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if sys.stderr.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
