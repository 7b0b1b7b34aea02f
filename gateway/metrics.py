"""Numbers for Prometheus. They name services, actions and outcomes; never persons, ids or paths.

Several worker processes count into files of one directory (`PROMETHEUS_MULTIPROC_DIR`), which
`gateway.frontends.serve` makes before any of them starts; `gateway.frontends.admin` adds them up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

#: Where the workers count.
DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

EXCHANGES = Counter(
    "havengate_exchanges",
    "Exchanges that are over.",
    ("service", "action", "status", "decision"),
)
DURATION = Histogram(
    "havengate_exchange_duration_seconds",
    "From the head of the request to the end of the answer.",
    ("service",),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
IN_FLIGHT = Gauge(
    "havengate_exchanges_in_flight", "Exchanges in progress.", multiprocess_mode="livesum"
)
UPSTREAM_FAILURES = Counter(
    "havengate_upstream_failures", "Requests that an app did not answer.", ("service", "code")
)
FAILURES = Counter("havengate_failures", "Exchanges that ended in a failure.", ("code",))
UNLOGGED = Counter(
    "havengate_unlogged_refusals",
    "Refusals of somebody unknown beyond what is written into the log one by one.",
)
RULES_REFUSED = Gauge(
    "havengate_rules_refused",
    "1 while changed rules or tables are refused and those before stay in force.",
    multiprocess_mode="livemax",
)
BYTES = Counter("havengate_bytes", "Content received from and sent to clients.", ("direction",))


def exchanged(
    *, service: str, action: str, status: int, decision: str, failure: str | None, duration_s: float
) -> None:
    """Count one exchange. Only the class of its status is kept."""
    by_exchange, observe = _children(service, action, f"{status // 100}xx", decision)
    by_exchange()
    observe(duration_s)
    if failure is not None:
        FAILURES.labels(failure).inc()


@lru_cache(maxsize=4096)
def _children(
    service: str, action: str, status: str, decision: str
) -> tuple[Callable[[], None], Callable[[float], None]]:
    return EXCHANGES.labels(service, action, status, decision).inc, DURATION.labels(service).observe


def exposition(directory: Path | None = None) -> bytes:
    """What all workers counted, in Prometheus' text format. Numbers of dead ones stay in it.

    `directory` is where they count; without it, what the environment says.
    """
    directory = directory or Path(os.environ[DIRECTORY_VARIABLE])
    for file in directory.glob("gauge_live*.db"):
        number = int(file.stem.rpartition("_")[2])
        if not _lives(number):
            mark_process_dead(number, str(directory))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
