"""Secure aggregation for 100 clients of 10,000 values, five of which drop out before their vector.

`federated.secagg_client_ms` is one client's whole round, `federated.secagg_server_ms` the server's,
both without noise, and with shares between all clients. The peer does the same: Flower's SecAgg+
client functions as shipped, and its primitives in the order of its server's workflow, with as many
shares and the same threshold. Rebuilding secrets takes the peer many minutes, so one seed is
measured and multiplied by the number of 16-byte blocks that a round rebuilds.

Milliseconds are of processor time: nothing here waits for anything but the processor.

The figures with `noise` add what the peer does not do: each client's exact noise, and taking the
excess off again.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from benchmarks.harness import Result, alternate
from federated.aggregation.bits import SystemBits
from federated.aggregation.client import SecureClient
from federated.aggregation.plan import RoundPlan, default_colluding, default_threshold
from federated.aggregation.server import SecureServer, Stage
from federated.model import NoisePlan

CLIENTS = 100
VALUES = 10_000
DROPPED = 5
#: For how many drop-outs noise is planned.
TOLERATED = 20
THRESHOLD = default_threshold(CLIENTS)
BOUND = 1000
MODULUS_BITS = 32
ROUNDS = 3
PEER = "Flower's SecAgg+ functions"


def run() -> dict[str, Result]:
    """Measure rounds of both by turns."""
    with warnings.catch_warnings():
        # Flower deprecates what it ships for this.
        warnings.simplefilter("ignore")
        peer = _Peer()
        plain, noisy = _Ours(None), _Ours(NoisePlan(mechanism="discrete_gaussian", scale=200.0))
        client_ms, peer_client_ms = alternate(plain.round, peer.client_ms, rounds=ROUNDS)
        server_ms, peer_server_ms = alternate(plain.take_server_ms, peer.server_ms, rounds=ROUNDS)
        noisy_client_ms = [noisy.round() for _ in range(ROUNDS)]
    noisy_server_ms = [noisy.take_server_ms() for _ in range(ROUNDS)]
    return {
        "federated.secagg_client_ms": Result.of(
            client_ms, unit="ms", peer=PEER, peer_rounds=peer_client_ms
        ),
        "federated.secagg_server_ms": Result.of(
            server_ms, unit="ms", peer=f"{PEER} (rebuilding extrapolated)",
            peer_rounds=peer_server_ms,
        ),
        "federated.bytes_per_client": Result.of(
            plain.sent_bytes, unit="bytes", peer=PEER, peer_rounds=[peer.sent_bytes]
        ),
        "federated.secagg_noise_client_ms": Result.of(noisy_client_ms, unit="ms"),
        "federated.secagg_noise_server_ms": Result.of(noisy_server_ms, unit="ms"),
        "federated.secagg_noise_bytes_per_client": Result.of(noisy.sent_bytes, unit="bytes"),
    }  # fmt: skip


class _Ours:
    """Whole rounds of ours, all clients in this process."""

    def __init__(self, noise: NoisePlan | None) -> None:
        self._keys = {f"node-{at}": Ed25519PrivateKey.generate() for at in range(CLIENTS)}
        self._vectors = {node: _vector() for node in self._keys}
        self._plan = RoundPlan(
            study="bench",
            round_id="1",
            dimension=VALUES,
            bound=CLIENTS * BOUND,
            modulus_bits=MODULUS_BITS,
            roster={node: key.public_key().public_bytes_raw() for node, key in self._keys.items()},
            threshold=THRESHOLD,
            minimum_survivors=CLIENTS - TOLERATED,
            colluding=default_colluding(CLIENTS),
            noise=noise,
        )
        self._server_ms: list[float] = []
        self.sent_bytes: list[float] = []

    def round(self) -> float:
        """Return a client's milliseconds, the mean of those that stayed."""
        clients = {node: self._client(node) for node in self._plan.nodes}
        server, stay = SecureServer(self._plan), self._plan.nodes[DROPPED:]
        client_s, server_s, sent = 0.0, 0.0, 0
        while server.stage is not Stage.DONE:
            late = server.stage not in {Stage.ADVERTISE, Stage.SHARE}
            started = time.process_time()
            requests = server.requests()
            server_s += time.process_time() - started
            replies = {}
            for node in stay if late else self._plan.nodes:
                started = time.process_time()
                replies[node] = clients[node].answer(requests[node])
                if node in stay:
                    client_s += time.process_time() - started
                    sent += len(replies[node])
            started = time.process_time()
            server.collect(replies)
            server_s += time.process_time() - started
        self._check(server)
        self._server_ms.append(server_s * 1e3)
        self.sent_bytes.append(sent / len(stay))
        return client_s / len(stay) * 1e3

    def take_server_ms(self) -> float:
        """Return the server's milliseconds of one of the rounds that were run."""
        return self._server_ms.pop()

    def _client(self, node: str) -> SecureClient:
        return SecureClient(
            plan=self._plan,
            node=node,
            identity=self._keys[node],
            contribution=lambda: self._vectors[node],
            random=SystemBits(),
        )

    def _check(self, server: SecureServer) -> None:
        result = server.result()
        if len(result.survivors) != CLIENTS - DROPPED:
            raise RuntimeError("the round lost more clients than it should")
        total = np.sum([self._vectors[node] for node in result.survivors], axis=0)
        if result.noise is None and not np.array_equal(result.total, total):
            raise RuntimeError("the sum is wrong")


class _Peer:
    """Flower's functions, in the order in which its client mod and server workflow call them."""

    def __init__(self) -> None:
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

        self.sent_bytes = 0.0
        self._blocks = 0
        self._keys = [
            [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(2)] for _ in range(CLIENTS)
        ]

    def client_ms(self) -> float:
        """Return the milliseconds of one client's round: four stages of the client mod."""
        from flwr.client.mod.secure_aggregation.secaggplus_mod import (
            SecAggPlusState,
            _collect_masked_vectors,
            _setup,
            _share_keys,
            _unmask,
        )
        from flwr.common import ndarrays_to_parameters
        from flwr.common.secure_aggregation.secaggplus_constants import Key

        state: Any = SecAggPlusState()
        parameters = ndarrays_to_parameters([_vector().astype(np.float64)])
        started = time.process_time()
        setup: Any = _setup(state, _setup_configs(Key))
        spent = time.process_time() - started
        keys: Any = dict(enumerate(self._keys))
        keys[0] = [setup[Key.PUBLIC_KEY_1], setup[Key.PUBLIC_KEY_2]]
        started = time.process_time()
        offered: Any = {str(node): pair for node, pair in keys.items()}
        shared: Any = _share_keys(state, offered)
        spent += time.process_time() - started
        delivered: Any = {
            Key.SOURCE_LIST: list(range(1, CLIENTS)),
            Key.CIPHERTEXT_LIST: [_sealed(state, node) for node in range(1, CLIENTS)],
        }
        started = time.process_time()
        masked: Any = _collect_masked_vectors(state, delivered, 1, parameters)
        revealed: Any = _unmask(state, _lists(Key))
        spent += time.process_time() - started
        self.sent_bytes = float(
            sum(map(len, setup.values()))
            + sum(map(len, shared[Key.CIPHERTEXT_LIST]))
            + sum(map(len, masked[Key.MASKED_PARAMETERS]))
            + sum(map(len, revealed[Key.SHARE_LIST]))
        )
        blocks = [-(-(len(secret) + 1) // 16) for secret in (state.rd_seed, state.sk1)]
        self._blocks = (CLIENTS - DROPPED) * blocks[0] + DROPPED * blocks[1]
        return spent * 1e3

    def server_ms(self) -> float:
        """Return the milliseconds of the workflow's sum and unmask stage."""
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.ndarrays_arithmetic import (
            parameters_addition,
            parameters_mod,
            parameters_subtraction,
        )
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
        from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs

        modulus = 1 << MODULUS_BITS
        shape: list[tuple[int, ...]] = [(VALUES,)]
        vectors: list[Any] = [[_vector()] for _ in range(CLIENTS - DROPPED)]
        private, seed = generate_key_pairs()[0], os.urandom(32)
        shares = create_shares(seed, THRESHOLD, CLIENTS)[: CLIENTS - DROPPED]
        started = time.process_time()
        combine_shares(shares)
        # A seed of 32 bytes is padded to three blocks.
        rebuilding = (time.process_time() - started) / 3 * self._blocks
        started = time.process_time()
        total = vectors[0]
        for vector in vectors[1:]:
            total = parameters_addition(total, vector)
        for _ in range(CLIENTS - DROPPED):
            total = parameters_subtraction(total, pseudo_rand_gen(seed, modulus, shape))
        for _ in range(DROPPED):
            for first, _second in self._keys[: CLIENTS - DROPPED]:
                key = generate_shared_key(private, bytes_to_public_key(first))
                total = parameters_addition(total, pseudo_rand_gen(key, modulus, shape))
        parameters_mod(total, modulus)
        return (time.process_time() - started + rebuilding) * 1e3


def _setup_configs(key: Any) -> Any:
    return {
        key.SAMPLE_NUMBER: CLIENTS,
        key.SHARE_NUMBER: CLIENTS,
        key.THRESHOLD: THRESHOLD,
        key.CLIPPING_RANGE: float(BOUND),
        key.TARGET_RANGE: 1 << 22,
        key.MOD_RANGE: 1 << MODULUS_BITS,
        key.MAX_WEIGHT: 1.0,
    }


def _lists(key: Any) -> Any:
    return {
        key.ACTIVE_NODE_ID_LIST: list(range(CLIENTS - DROPPED)),
        key.DEAD_NODE_ID_LIST: list(range(CLIENTS - DROPPED, CLIENTS)),
    }


def _sealed(state: Any, node: int) -> bytes:
    """What another client would have sealed; its shares are stand-ins of the right size."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
    from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

    own = state.nid
    text = share_keys_plaintext_concat(
        node, own, state.rd_seed_share_dict[own], state.sk1_share_dict[own]
    )
    return encrypt(state.ss2_dict[node], text)


def _vector() -> NDArray[np.int64]:
    return np.random.default_rng().integers(-BOUND, BOUND + 1, VALUES, dtype=np.int64)
