"""Counts in, JAX Privacy's bounds out: JSON on standard input and output.

Its module on audits alone is loaded, from where it was installed: the package imports JAX, which
that module does not need.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load(folder: Path) -> ModuleType:
    """The module, out of the folder that the package was installed into."""
    spec = importlib.util.spec_from_file_location(
        "jax_privacy_auditing", folder / "jax_privacy" / "auditing.py"
    )
    if spec is None or spec.loader is None:
        raise SystemExit("jax-privacy is not installed there")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def bound(peer: ModuleType, case: dict[str, Any]) -> float:
    """Scores 1 for who is guessed, all of them "in", and 0 for the others."""
    guesses, correct = case["guesses"], case["correct"]
    others = [0.0] * (case["canaries"] - guesses)
    auditor = peer.CanaryScoreAuditor([1.0] * correct, [1.0] * (guesses - correct) + others)
    return float(
        auditor.epsilon_one_run(
            1 - case["confidence"], case["delta"], threshold_strategy=peer.Explicit(0.5)
        )
    )


if __name__ == "__main__":
    loaded = load(Path(sys.argv[1]))
    json.dump([bound(loaded, case) for case in json.load(sys.stdin)], sys.stdout)
