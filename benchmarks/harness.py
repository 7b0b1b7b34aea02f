"""What every benchmark returns, and how a figure and its spread are taken.

A suite is a module with `run() -> dict[str, Result]`; `benchmarks/run.py` runs them, prints the
table and writes `results.json`. Figures are medians over rounds; ours and the peer's rounds
alternate, because the machine is small and its speed drifts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One figure.

    `spread` is the largest minus the smallest round; `peer` names what is compared with.
    """

    median: float
    spread: float
    unit: str
    peer: str | None = None
    peer_median: float | None = None

    @classmethod
    def of(
        cls,
        rounds: list[float],
        *,
        unit: str,
        peer: str | None = None,
        peer_rounds: list[float] | None = None,
    ) -> Result:
        """Median and spread of `rounds`, beside the peer's median from the same run."""
        return cls(
            median=statistics.median(rounds),
            spread=max(rounds) - min(rounds),
            unit=unit,
            peer=peer,
            peer_median=statistics.median(peer_rounds) if peer_rounds else None,
        )


def alternate(
    ours: Callable[[], float], peer: Callable[[], float], *, rounds: int = 5
) -> tuple[list[float], list[float]]:
    """Measure both by turns; return the rounds of each."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return [a for a, _ in pairs], [b for _, b in pairs]
