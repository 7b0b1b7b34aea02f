"""The trusted-server mode: the same rounds without masks; the server adds the noise.

Here the server sees every node's vector as it is, so privacy rests on the server being honest and
unbreached. It is not the default, and every result names it (`RoundResult.trust_model`). One stage:
a node sends its vector, the server adds them and the whole planned noise once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.client import Contribution, checked
from federated.aggregation.encoding import from_residues, pack, to_residues, unpack
from federated.aggregation.messages import Begin, Plain, encode, parse
from federated.aggregation.noise import sample
from federated.aggregation.plan import RoundPlan
from federated.aggregation.server import RoundResult, Stage
from federated.errors import CohortError, ProtocolError
from federated.model import RandomBits


class TrustedClient:
    """One node in one round in which it trusts the server with its vector."""

    def __init__(self, *, plan: RoundPlan, node: str, contribution: Contribution) -> None:
        """Raises `ProtocolError` if the plan does not say `trusted_server`, or not this node."""
        if plan.trust_model != "trusted_server" or node not in plan.roster:
            raise ProtocolError("The plan does not trust the server, or this node is not in it.")
        self._plan = plan
        self._node = node
        self._contribution = contribution
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the round is over for this node."""
        return self._finished

    def answer(self, request: bytes) -> bytes:
        """Answer the server's only request. Raises `ProtocolError`, and the round is over."""
        if self._finished:
            raise ProtocolError("This round is over for this node: it answers nothing more.")
        self._finished = True
        parse(Begin, request, self._plan)
        bits = self._plan.modulus_bits
        vector = to_residues(checked(self._contribution(), self._plan), bits)
        return encode(Plain(self._plan.digest, self._node, pack(vector, bits)))


class TrustedServer:
    """One round in which the server is trusted: it sees every vector and adds the noise."""

    def __init__(self, plan: RoundPlan, *, random: RandomBits) -> None:
        if plan.trust_model != "trusted_server":
            raise ProtocolError("The plan does not trust the server.")
        self._plan = plan
        self._random = random
        self._stage = Stage.MASK
        self._dropped: dict[str, str] = {}
        self._survivors: tuple[str, ...] = ()
        self._total: NDArray[np.int64] | None = None

    @property
    def stage(self) -> Stage:
        """`MASK` while vectors are awaited."""
        return self._stage

    @property
    def dropped(self) -> Mapping[str, str]:
        """Nodes that dropped out, and why, in a few words."""
        return self._dropped

    def requests(self) -> dict[str, bytes]:
        """What to send to whom; empty when the round is over."""
        if self._stage is not Stage.MASK:
            return {}
        return dict.fromkeys(self._plan.nodes, encode(Begin(self._plan.digest)))

    def collect(self, replies: Mapping[str, bytes]) -> None:
        """Add up what came, and the noise. Raises `CohortError` below the minimum."""
        if self._stage is not Stage.MASK:
            raise ProtocolError(f"The round is {self._stage}: nothing more is collected.")
        vectors: dict[str, NDArray[np.int64]] = {}
        for node in self._plan.nodes:
            try:
                vectors[node] = self._vector(node, replies.get(node))
            except (ProtocolError, ValueError) as error:
                self._dropped[node] = f"{self._stage}: {error}"
        if len(vectors) < self._plan.minimum_survivors:
            self._stage = Stage.ABORTED
            raise CohortError(
                f"{len(vectors)} nodes sent a vector, {self._plan.minimum_survivors} are needed: "
                "the round is over, nothing is released."
            )
        total = np.sum(list(vectors.values()), axis=0, dtype=np.int64)
        if self._plan.noise is not None:
            total += sample(self._plan.dimension, plan=self._plan.noise, random=self._random)
        self._survivors, self._total = tuple(vectors), total
        self._stage = Stage.DONE

    def result(self) -> RoundResult:
        """Return the sum. Raises `ProtocolError` before the round is done."""
        if self._total is None:
            raise ProtocolError(f"The round is at stage `{self._stage}`: there is no sum.")
        return RoundResult(
            total=self._total,
            survivors=self._survivors,
            noise=self._plan.noise,
            noise_weight=1.0 if self._plan.noise else 0.0,
            log_ratio=0.0,
            trust_model=self._plan.trust_model,
        )

    def _vector(self, node: str, reply: bytes | None) -> NDArray[np.int64]:
        if reply is None:
            raise ProtocolError("no answer")
        message, plan = parse(Plain, reply, self._plan), self._plan
        if message.node != node:
            raise ProtocolError("The answer names another node than the one it came from.")
        residues = unpack(message.values, dimension=plan.dimension, modulus_bits=plan.modulus_bits)
        vector = from_residues(residues, plan.modulus_bits)
        if int(vector.max()) > plan.bound or int(vector.min()) < -plan.bound:
            raise ProtocolError("The vector is beyond the plan's bound.")
        return vector
