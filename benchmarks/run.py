"""`make bench`: run every suite, print a table, write `benchmarks/results.json`.

make bench                      everything
make bench ARGS="--only keys"   suites whose name contains the word
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from importlib import import_module
from pathlib import Path

# Run as a file, so that `make bench` needs nothing on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Result

SUITES = (
    "bench_keys",
    "bench_audit",
    "bench_index",
    "bench_policies",
    "bench_ingress",
    "bench_secagg",
    "bench_analytics",
    "bench_federated",
    "bench_learning_targets",
    "bench_opacus",
    "bench_simulation",
)
RESULTS = Path(__file__).with_name("results.json")


def main() -> None:
    """Measure what was asked for; figures of suites that did not run stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run only suites whose name contains this")
    chosen = [name for name in SUITES if parser.parse_args().only in name]
    # Wide enough for every column where nobody set a width.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    results: dict[str, Result] = {}
    for name in chosen:
        with console.status(f"{name} …"):
            results |= import_module(f"benchmarks.{name}").run()
    console.print(_table(results))
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept |= {name: dataclasses.asdict(result) for name, result in results.items()}
    RESULTS.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    console.print(f"Written to {RESULTS.relative_to(Path.cwd(), walk_up=True)}")


def _table(results: dict[str, Result]) -> Table:
    table = Table(title=f"Havengate on {platform.machine()}, Python {platform.python_version()}")
    for heading in ("figure", "median", "spread", "unit", "peer's median", "peer"):
        words = heading in {"figure", "unit", "peer"}
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "peer")
    for name, result in sorted(results.items()):
        peer = "" if result.peer_median is None else _number(result.peer_median)
        table.add_row(
            name,
            _number(result.median),
            _number(result.spread),
            result.unit,
            peer,
            result.peer or "",
        )
    return table


def _number(value: float) -> str:
    """Three digits or so, and never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
