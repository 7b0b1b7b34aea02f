"""Bounds as an independent implementation gives them: JAX Privacy 2.0.0, `jax_privacy.auditing`.

`CanaryScoreAuditor.epsilon_one_run` with an explicit threshold, of scores made so that as many
guesses are made and right. `tests/interop/test_audit_peer.py` computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from federated.learning.one_run_bound import lower_bound


@dataclass(frozen=True, slots=True)
class Counted:
    """What an audit counted."""

    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float = 0.95

    def bound(self) -> float:
        """Ours."""
        return lower_bound(
            canaries=self.canaries,
            guesses=self.guesses,
            correct=self.correct,
            delta=self.delta,
            confidence=self.confidence,
        )


REFERENCES: Final = {
    Counted(1000, 100, 75, 1e-4): 0.6730,
    Counted(1000, 100, 75, 1e-12): 0.7022,
    Counted(200, 100, 100, 1e-5): 3.4875,
    Counted(100, 30, 24, 1e-3): 0.4869,
    Counted(500, 128, 100, 1e-4): 0.8961,
    Counted(1000, 182, 160, 1e-5): 1.5968,
    Counted(1000, 182, 160, 1e-3): 0.9510,
    Counted(1000, 506, 440, 3e-4, 0.99): 1.2967,
    Counted(5000, 2136, 2000, 1e-4): 2.5166,
    Counted(5000, 548, 400, 1e-5, 0.99): 0.7603,
    Counted(1000, 92, 50, 1e-4): 0.0,
    Counted(20, 10, 10, 1e-12): 1.0519,
    Counted(2000, 400, 399, 1e-6, 0.999): 3.7128,
}
