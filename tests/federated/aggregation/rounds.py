"""A cohort of real clients and a real server in one process, with hands on every message."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.client import SecureClient
from federated.aggregation.encoding import from_residues, unscale
from federated.aggregation.plan import RoundPlan, default_threshold
from federated.aggregation.server import RoundResult, SecureServer, Stage
from federated.errors import ProtocolError
from federated.model import NoisePlan

#: Changes what a node answers at a stage; None: it answers nothing.
type Tamper = Callable[[Stage, str, bytes], bytes | None]

STAGES = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.CONSISTENCY, Stage.UNMASK)


def identity(name: str) -> Ed25519PrivateKey:
    """Return a node's enrolled key, the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(name: str) -> bytes:
    """Return the public half of it."""
    return identity(name).public_key().public_bytes_raw()


def make_plan(names: int = 6, **changes: Any) -> RoundPlan:
    """Return a small round without noise, but for `changes`; with noise one node colludes."""
    settings: dict[str, Any] = {
        "study": "mood-and-sleep",
        "round_id": "1",
        "dimension": 5,
        "bound": 1000 * names,
        "modulus_bits": 32,
        "roster": {f"node-{at}": public(f"node-{at}") for at in range(names)},
        "threshold": default_threshold(names),
        "minimum_survivors": default_threshold(names),
        "colluding": 0 if changes.get("noise") is None else 1,
        "noise": None,
    }
    return RoundPlan(**(settings | changes))


def noise(mechanism: Any = "discrete_gaussian", scale: float = 20.0) -> NoisePlan:
    """Return a planned noise."""
    return NoisePlan(mechanism=mechanism, scale=scale)


class RecordingClient(SecureClient):
    """A real client that also keeps what it would rather not: for tests of the sum."""

    noisy: NDArray[np.int64] | None = None
    seeds: tuple[bytes, ...] = ()

    def _noisy_vector(self) -> NDArray[np.uint64]:
        residues = super()._noisy_vector()
        self.noisy = from_residues(residues, self._plan.modulus_bits)
        self.seeds = self._mine.increments
        return residues


class Cohort:
    """All nodes of a plan, and its server."""

    def __init__(self, plan: RoundPlan, *, seed: int = 1, minimum_people: int = 0) -> None:
        self.plan = plan
        self._minimum_people = minimum_people
        draws = np.random.default_rng(seed)
        self.vectors = {
            node: draws.integers(-1000, 1001, plan.dimension, dtype=np.int64) for node in plan.nodes
        }
        self.asked: list[str] = []
        self.clients = {node: self.client(node, seed=seed) for node in plan.nodes}
        self.server = SecureServer(plan)
        self.refusals: dict[str, ProtocolError] = {}

    def client(self, node: str, *, seed: int = 1) -> RecordingClient:
        """Return a fresh client of a node."""
        return RecordingClient(
            plan=self.plan,
            node=node,
            identity=identity(node),
            contribution=lambda: self._contribution(node),
            random=SeededBits(hashlib.sha256(f"{node} {seed}".encode()).digest(), b"test"),
            minimum_people=self._minimum_people,
        )

    def _contribution(self, node: str) -> NDArray[np.int64]:
        self.asked.append(node)
        return self.vectors[node]

    def answers(
        self,
        requests: Mapping[str, bytes],
        *,
        gone: frozenset[str] = frozenset(),
        tamper: Tamper | None = None,
    ) -> dict[str, bytes]:
        """Let every node that is not gone answer; refusals are kept."""
        stage, replies = self.server.stage, {}
        for node, request in requests.items():
            if node in gone:
                continue
            try:
                reply: bytes | None = self.clients[node].answer(request)
            except ProtocolError as refusal:
                self.refusals[node] = refusal
                continue
            if tamper is not None and reply is not None:
                reply = tamper(stage, node, reply)
            if reply is not None:
                replies[node] = reply
        return replies

    def until(self, stage: Stage, **how: Any) -> dict[str, bytes]:
        """Go on honestly until `stage`; return its requests."""
        while self.server.stage is not stage:
            self.server.collect(self.answers(self.server.requests(), **how))
        return self.server.requests()

    def run(
        self,
        *,
        drops: Mapping[Stage, frozenset[str]] | None = None,
        tamper: Tamper | None = None,
    ) -> RoundResult:
        """Run the round; nodes drop out before they answer at their stage, and stay away."""
        gone: frozenset[str] = frozenset()
        while self.server.stage is not Stage.DONE:
            gone |= (drops or {}).get(self.server.stage, frozenset())
            replies = self.answers(self.server.requests(), gone=gone, tamper=tamper)
            self.server.collect(replies)
        return self.server.result()

    def plain_sum(self, nodes: tuple[str, ...]) -> NDArray[np.int64]:
        """Return the sum of what these nodes hold."""
        return np.sum([self.vectors[node] for node in nodes], axis=0, dtype=np.int64)

    def expected(self, nodes: tuple[str, ...]) -> NDArray[np.int64]:
        """Return the sum of these nodes with exactly the noise that must stay in it."""
        total = np.zeros(self.plan.dimension, dtype=np.int64)
        schedule = self.plan.schedule
        for node in nodes:
            client = self.clients[node]
            assert client.noisy is not None
            total += client.noisy
            if schedule is None:
                continue
            for part in schedule.removed(len(nodes)):
                total -= schedule.increment(
                    part, dimension=self.plan.dimension, seed=client.seeds[part]
                )
        return unscale(total, self.plan.granularity)


def refuses(client: SecureClient, request: bytes, why: str) -> None:
    """The node refuses, its secrets are gone, and it answers nothing from then on."""
    with pytest.raises(ProtocolError, match=why):
        client.answer(request)
    assert client.finished
    assert client._secrets is None
    assert client._held == {}
    with pytest.raises(ProtocolError, match="over for this node"):
        client.answer(request)


def answers_nothing(client: SecureClient, request: bytes) -> None:
    """The round is over for the node and no secret of it is left."""
    assert client.finished
    assert client._secrets is None
    assert client._held == {}
    with pytest.raises(ProtocolError, match="over for this node"):
        client.answer(request)
