"""What one round of secure aggregation is: who, how many, modulo what, with which noise.

The plan is made by the coordinator and known to every node before the round starts; its hash is in
every message and under every signature, so nothing of one round means anything in another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from federated.aggregation.encoding import needed_modulus_bits
from federated.aggregation.schedule import NoiseSchedule, noise_schedule
from federated.errors import AccountingError, ProtocolError
from federated.model import NoisePlan, TrustModel

#: Every node shares secrets with every other; beyond this, cost per node grows out of hand.
LARGEST_ROSTER: Final = 1000
#: With two nodes, each learns the other's vector from the sum.
SMALLEST_ROSTER: Final = 3
LARGEST_DIMENSION: Final = 1 << 22

_DOMAIN: Final = b"havengate/secagg/plan/v1\n"
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """One round. Raises `ProtocolError` if it does not protect what it should.

    - `question`: what is asked, so that two questions of one study never share a plan.
    - `roster`: node id → the raw Ed25519 public key that the node is enrolled with.
    - `bound`: largest |coordinate| of the sum over all nodes, before noise.
    - `modulus_bits`: b; vectors are added modulo 2^b. Must hold `bound` and the noise's tails.
    - `threshold`: t, how many nodes can rebuild a vanished node's secrets; more than 2n/3.
    - `minimum_survivors`: vectors that the sum must be made of; at least t.
    - `colluding`: how many nodes may be in league with the server without the answer losing
      privacy: the others' noise alone is the planned noise. Below t and at most 2t - n - 1, and at
      least 1 where the nodes add noise: each knows its own, and may read the answer.
    - `noise`: None where the sum is released without (tests; sums that are public anyway).
    - `people`: node id → for how many people it speaks, all of the roster or nobody. Each node
      holds its own number against what it knows, so that in one plan every honest node's is true.
    - `minimum_people`: for how many those whose vectors are in the sum must speak.
    - `given`: SHA-256, in hex, of what the round starts from, such as weights; empty for nothing.
    """

    study: str
    round_id: str
    dimension: int
    bound: int
    modulus_bits: int
    roster: Mapping[str, bytes] = field(repr=False)
    threshold: int
    minimum_survivors: int
    colluding: int
    noise: NoisePlan | None
    trust_model: TrustModel = "secure_aggregation"
    question: str = ""
    people: Mapping[str, int] = field(default_factory=dict, repr=False)
    minimum_people: int = 0
    given: str = ""
    #: Node ids, sorted; a node's share is that at its place, counted from 1.
    nodes: tuple[str, ...] = field(init=False, repr=False)
    #: None without noise.
    schedule: NoiseSchedule | None = field(init=False, repr=False)
    #: SHA-256 over everything above, in one canonical form.
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(sorted(self.roster)))
        self._check_names()
        self._check_numbers()
        schedule = self._schedule()
        object.__setattr__(self, "schedule", schedule)
        needed = needed_modulus_bits(bound=self.bound, dimension=self.dimension, schedule=schedule)
        if not needed <= self.modulus_bits <= 64:  # noqa: PLR2004 - a machine word
            raise ProtocolError(
                f"The modulus must have {needed} to 64 bits for this bound and noise, not "
                f"{self.modulus_bits}: choose coarser integers or fewer people."
            )
        object.__setattr__(self, "digest", hashlib.sha256(self._canonical()).digest())

    @property
    def granularity(self) -> int:
        """What a vector is multiplied by before noise is added."""
        return self.schedule.granularity if self.schedule else 1

    def speak_for(self, nodes: Iterable[str]) -> int:
        """For how many people these nodes of the roster speak together."""
        return sum(self.people.get(node, 0) for node in nodes)

    def _check_names(self) -> None:
        if not all(_ID.fullmatch(name) for name in (self.study, self.round_id, *self.nodes)):
            raise ProtocolError("An id of the plan is not letters, digits and ._:/- (128 at most).")
        if not SMALLEST_ROSTER <= len(self.nodes) <= LARGEST_ROSTER:
            raise ProtocolError(
                f"A round needs {SMALLEST_ROSTER} to {LARGEST_ROSTER} nodes, not {len(self.nodes)}."
            )
        if len(set(self.roster.values())) != len(self.roster):
            raise ProtocolError("Two nodes of the plan have the same key.")
        for key in self.roster.values():
            try:
                Ed25519PublicKey.from_public_bytes(key)
            except (ValueError, UnsupportedAlgorithm) as error:
                raise ProtocolError("A key of the plan is not an Ed25519 public key.") from error

    def _check_numbers(self) -> None:
        nodes = len(self.nodes)
        if not 1 <= self.dimension <= LARGEST_DIMENSION or self.bound < 1:
            raise ProtocolError("The plan's vectors have no length or no bound.")
        if not 2 * nodes < 3 * self.threshold <= 3 * nodes:
            raise ProtocolError(
                f"The threshold must be over two thirds of {nodes} nodes and at most all of them, "
                f"not {self.threshold}."
            )
        if not self.threshold <= self.minimum_survivors <= nodes:
            raise ProtocolError(
                "Fewer survivors than the threshold, or more than nodes, are asked."
            )
        if not 0 <= self.colluding < min(self.threshold, 2 * self.threshold - nodes):
            raise ProtocolError(
                f"{self.colluding} colluding nodes of {nodes} could show two lists of survivors at "
                f"threshold {self.threshold}: raise the threshold or expect fewer."
            )
        named = not self.people or self.people.keys() == self.roster.keys()
        if not named or self.speak_for(self.nodes) < self.minimum_people:
            raise ProtocolError(
                f"The plan's nodes speak for {self.speak_for(self.nodes)} people; for each of them "
                f"it must be said, and {self.minimum_people} are asked for."
            )
        masked = self.trust_model == "secure_aggregation"
        if masked and self.noise is not None and self.colluding < 1:
            raise ProtocolError(
                "At least one colluding node must be expected: whoever reads the answer and knows "
                "his own node's noise takes that off."
            )

    def _schedule(self) -> NoiseSchedule | None:
        if self.noise is None:
            return None
        try:
            return noise_schedule(
                self.noise,
                nodes=len(self.nodes),
                minimum_survivors=self.minimum_survivors,
                colluding=self.colluding,
            )
        except AccountingError as error:
            raise ProtocolError(f"The plan's noise cannot be shared: {error}") from error

    def _canonical(self) -> bytes:
        noise = self.noise
        return _DOMAIN + msgspec.json.encode(
            [
                self.study,
                self.round_id,
                self.dimension,
                str(self.bound),
                self.modulus_bits,
                [[node, self.roster[node].hex()] for node in self.nodes],
                self.threshold,
                self.minimum_survivors,
                self.colluding,
                None if noise is None else [noise.mechanism, float(noise.scale).hex()],
                self.trust_model,
                self.question,
                sorted(self.people.items()),
                self.minimum_people,
                self.given,
            ]
        )


def default_threshold(nodes: int) -> int:
    """The smallest number over two thirds."""
    return 2 * nodes // 3 + 1


def default_colluding(nodes: int) -> int:
    """A sixth, rounded down, at least one: costs a fifth more variance where all survive."""
    return max(1, nodes // 6)
