"""Simulated rounds spread over processes or machines by Flower's simulation on Ray.

A thin adapter: each of Flower's virtual clients handles a *chunk* of devices with the vectorised
backend, so that Flower moves a few messages a round and not one for each device. Everything else,
noise and steps included, is `training.simulate` in the server app. Ray is no dependency of the
project: it comes with `flwr[simulation]`, and without it this module refuses.

Devices lie in a folder that every machine sees, as NumPy's own files, and are mapped, not copied.
They are public or made-up people: nothing of this protects them on their way.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SEED_BYTES, SeededBits
from federated.deployment.processes import QUIET
from federated.errors import DeploymentError
from federated.learning.spec import TrainSpec
from federated.model import NoisePlan, RandomBits
from federated.simulation.devices import Devices
from federated.simulation.training import (
    Course,
    Population,
    Simulated,
    Summing,
    Target,
    simulate,
)
from federated.simulation.vectorised import RoundSum, Vectorised

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

_FILES: Final = ("x", "y", "starts")
_LABEL: Final = b"flower chunk"
_POLL_S: Final = 0.05
#: Neither Flower nor Ray tells its makers that it runs.
_SILENT: Final = {**QUIET, "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How the work is spread. `clients`: Flower's virtual clients, each with a chunk of each round.

    `folder`: where devices lie for all machines. `cores`, `gpus`: what Ray gives each client's
    process; as many run at once as fit. `address`: of a Ray cluster that runs already; without it
    Ray starts on this machine alone. `timeout_s`: for one round.
    """

    folder: Path
    clients: int = 2
    cores: float = 1.0
    gpus: float = 0.0
    address: str | None = None
    backend: Vectorised = field(default_factory=lambda: Vectorised(workers=1))
    timeout_s: float = 3600.0


def store(devices: Devices, folder: Path) -> None:
    """Write devices for `load`. Overwrites those that lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        np.save(folder / f"{name}.npy", getattr(devices, name), allow_pickle=False)


@lru_cache(maxsize=1)
def load(folder: Path) -> Devices:
    """The devices in the folder, mapped into memory; read once in each process."""
    # Copy on write: torch takes only arrays that it could write to.
    x, y, starts = (
        np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in _FILES
    )
    return Devices(x=x, y=y, starts=starts)


def simulate_on_ray(
    population: Population,
    course: Course,
    *,
    noise: Target | NoisePlan | None,
    seed: bytes,
    spread: Spread,
    judged: bool = True,
    delta: float | None = None,
) -> Simulated:
    """`training.simulate`, with its sums made by Flower's virtual clients on Ray.

    The same result to floating tolerance; an exact course rounds with other bits, since each chunk
    has its own. Raises `DeploymentError` without Ray, and if a client fails: a sum that lacks a
    chunk would be another study's.
    """
    if importlib.util.find_spec("ray") is None:
        raise DeploymentError(
            "Flower's simulation needs Ray, which is not installed here: install `flwr[simulation]`"
            ", or use `training.simulate` on this machine alone."
        )
    _silence()
    from flwr.app import Context
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    store(population.devices, spread.folder)
    found: list[Simulated] = []
    server = ServerApp()

    @server.main()
    def run(grid: Grid, _: Context) -> None:
        found.append(
            simulate(
                population,
                course,
                noise=noise,
                seed=seed,
                summing=spread_over(grid, spread),
                judged=judged,
                delta=delta,
            )
        )

    run_simulation(
        server_app=server,
        client_app=client_app(population.spec, spread),
        num_supernodes=spread.clients,
        backend_name="ray",
        backend_config={
            "init_args": {"address": spread.address} if spread.address else {},
            "client_resources": {"num_cpus": spread.cores, "num_gpus": spread.gpus},
        },
    )
    if not found:
        raise DeploymentError("Flower's simulation ended without a result; its log says why.")
    return found[0]


def client_app(spec: TrainSpec, spread: Spread) -> ClientApp:
    """What each virtual client runs: one chunk's sum. It is pickled to Ray's workers by value."""
    from flwr.app import Context
    from flwr.clientapp import ClientApp

    app = ClientApp()
    folder, backend = spread.folder, spread.backend

    @app.train()
    def train(message: Message, _: Context) -> Message:
        return _chunk_summed(message, spec, load(folder), backend)

    return app


def spread_over(grid: Grid, spread: Spread) -> Summing:
    """Sums that the grid's clients make, added up in the order of the chunks."""

    def summed(
        weights: NDArray[np.float64], asked: NDArray[np.int64], random: RandomBits | None
    ) -> RoundSum:
        chunks = [one for one in np.array_split(asked, spread.clients) if len(one)]
        nodes = _nodes(grid, spread)[: len(chunks)]
        messages = [
            _asking(node, weights, chunk, random) for node, chunk in zip(nodes, chunks, strict=True)
        ]
        replies = {
            reply.metadata.src_node_id: reply
            for reply in grid.send_and_receive(messages, timeout=spread.timeout_s)
            if not reply.has_error()
        }
        if len(replies) < len(chunks):
            raise DeploymentError(
                f"{len(chunks) - len(replies)} of {len(chunks)} virtual clients failed or were "
                "late; Flower's log says why."
            )
        if not chunks:
            return RoundSum(total=np.zeros(weights.size), people=0, silent=0, clipped=0)
        return _added([_read(replies[node]) for node in nodes])

    return summed


def _nodes(grid: Grid, spread: Spread) -> list[int]:
    """All virtual clients. Flower registers them beside the server app, which may be faster."""
    deadline = time.monotonic() + spread.timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < spread.clients:
        if time.monotonic() > deadline:
            raise DeploymentError(f"Of {spread.clients} virtual clients {len(nodes)} started.")
        time.sleep(_POLL_S)
    return nodes


def _asking(
    node: int, weights: NDArray[np.float64], chunk: NDArray[np.int64], random: RandomBits | None
) -> Message:
    from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

    arrays = {"weights": Array(weights), "asked": Array(chunk)}
    if random is not None:
        seed = random.bits(8 * SEED_BYTES).to_bytes(SEED_BYTES, "little")
        arrays["seed"] = Array(np.frombuffer(seed, dtype=np.uint8))
    content = RecordDict({"round": ArrayRecord(arrays)})
    return Message(content=content, dst_node_id=node, message_type=MessageType.TRAIN)


def _chunk_summed(
    message: Message, spec: TrainSpec, devices: Devices, backend: Vectorised
) -> Message:
    """A virtual client's whole work."""
    from flwr.app import Array, ArrayRecord, Message, RecordDict

    arrays = message.content.array_records["round"]
    weights, asked = arrays["weights"].numpy(), arrays["asked"].numpy()
    if "seed" in arrays:
        bits = SeededBits(arrays["seed"].numpy().tobytes(), _LABEL)
        found = backend.exact_sum(spec, weights, devices, asked, bits)
    else:
        found = backend.round_sum(spec, weights, devices, asked)
    counts = np.array([found.people, found.silent, found.clipped])
    content = ArrayRecord({"total": Array(found.total), "counts": Array(counts)})
    return Message(content=RecordDict({"sum": content}), reply_to=message)


def _read(reply: Message) -> RoundSum:
    arrays = reply.content.array_records["sum"]
    people, silent, clipped = (int(count) for count in arrays["counts"].numpy())
    total: Any = arrays["total"].numpy()
    return RoundSum(total=total, people=people, silent=silent, clipped=clipped)


def _added(sums: Sequence[RoundSum]) -> RoundSum:
    return RoundSum(
        total=np.sum([one.total for one in sums], axis=0),
        people=sum(one.people for one in sums),
        silent=sum(one.silent for one in sums),
        clipped=sum(one.clipped for one in sums),
    )


def _silence() -> None:
    """No telemetry, also where Flower was imported before."""
    os.environ.update(_SILENT)
    from flwr.supercore import telemetry

    telemetry.FLWR_TELEMETRY_ENABLED = "0"
