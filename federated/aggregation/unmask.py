"""From masked vectors and reveals to the sum: the server's arithmetic, no state.

What is rebuilt from shares is checked against what its owner published; where the first holders'
shares give something else, other sets of holders are tried.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federated.aggregation import masks, shares
from federated.aggregation.encoding import from_residues, unscale
from federated.aggregation.messages import Advert, Reveal
from federated.aggregation.plan import RoundPlan
from federated.errors import CohortError, ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What the server has at the end. Nodes: advertised ⊇ shared ⊇ survivors ⊇ revealed."""

    plan: RoundPlan
    adverts: Mapping[str, Advert]
    commitments: Mapping[str, Sequence[bytes]]
    shared: frozenset[str]
    masked: Mapping[str, NDArray[np.uint64]] = field(repr=False)
    reveals: Mapping[str, Reveal] = field(repr=False)

    @property
    def survivors(self) -> frozenset[str]:
        """Those whose masked vectors came."""
        return frozenset(self.masked)

    @property
    def removed(self) -> tuple[int, ...]:
        """Increments of noise that come off."""
        schedule = self.plan.schedule
        return schedule.removed(len(self.masked)) if schedule else ()


def unmask(transcript: Transcript) -> NDArray[np.int64]:
    """Return the survivors' exact sum with its noise, granularity divided out.

    Raises `CohortError` if a secret that is needed cannot be rebuilt.
    """
    plan = transcript.plan
    total = np.zeros(plan.dimension, dtype=np.uint64)
    for vector in transcript.masked.values():
        total += vector
    # What is common to all rebuilding: weights by who holds shares.
    holders = _Holders(transcript)
    for node in sorted(transcript.survivors):
        seed, increments = _survivor_secrets(transcript, node, holders)
        key = masks.self_mask_key(seed, plan=plan.digest, node=node)
        total -= masks.expand(key, dimension=plan.dimension, modulus_bits=plan.modulus_bits)
        for part, increment in zip(transcript.removed, increments, strict=True):
            total -= _increment(plan, part, increment)
    for node in sorted(transcript.shared - transcript.survivors):
        private = holders.rebuild(node, "vanished", 0, _is_private_key(transcript, node))
        total -= _pair_masks(transcript, node, private)
    residues = total & np.uint64((1 << plan.modulus_bits) - 1)
    return unscale(from_residues(residues, plan.modulus_bits), plan.granularity)


def verify_reveal(transcript: Transcript, reveal: Reveal) -> None:
    """Raise `ProtocolError` unless a reveal is complete and its own secrets are as committed."""
    own = (reveal.seed, *reveal.increments)
    if len(reveal.increments) != len(transcript.removed):
        raise ProtocolError("A reveal has not the increments that come off.")
    for at, secret in enumerate(own):
        if not _is_committed(transcript, reveal.node, at)(secret):
            raise ProtocolError("A reveal has a secret that was not committed to.")
    living = [given.peer for given in reveal.survivors]
    gone = [given.peer for given in reveal.vanished]
    named = living + gone
    if len(set(named)) != len(named) or reveal.node in named:
        raise ProtocolError("A reveal names a node twice, or itself.")
    if not set(living) <= transcript.survivors:
        raise ProtocolError("A reveal takes one for a survivor who is not.")
    if not set(gone) <= transcript.shared - transcript.survivors:
        raise ProtocolError("A reveal takes one for vanished who is not.")
    if any(len(given.shares) != len(own) for given in reveal.survivors):
        raise ProtocolError("A reveal has too few shares of a survivor.")
    if any(len(given.shares) != 1 for given in reveal.vanished):
        raise ProtocolError("A reveal has not one share of who vanished.")


class _Holders:
    """Shares by owner, and Lagrange weights by set of holders."""

    def __init__(self, transcript: Transcript) -> None:
        self._threshold = transcript.plan.threshold
        self._places = {node: at for at, node in enumerate(transcript.plan.nodes, start=1)}
        self._weights: dict[tuple[int, ...], list[int]] = {}
        self._given: dict[tuple[str, str], dict[int, tuple[bytes, ...]]] = {}
        for holder, reveal in sorted(transcript.reveals.items()):
            place = self._places[holder]
            for kind, listed in (("survivors", reveal.survivors), ("vanished", reveal.vanished)):
                for given in listed:
                    self._given.setdefault((kind, given.peer), {})[place] = given.shares

    def rebuild(self, owner: str, kind: str, at: int, right: Callable[[bytes], bool]) -> bytes:
        """Return the secret for which `right` holds, from any t holders that give it.

        Tries as many sets as there are holders: enough to leave any one liar out, or a run of them.
        """
        given = self._given.get((kind, owner), {})
        places = sorted(given)
        for turn in range(len(places) if len(places) >= self._threshold else 0):
            chosen = tuple(sorted((places[turn:] + places[:turn])[: self._threshold]))
            if chosen not in self._weights:
                self._weights[chosen] = shares.weights(chosen)
            try:
                found = shares.rebuild(
                    [given[place][at] for place in chosen], self._weights[chosen]
                )
            except ProtocolError:
                continue
            if right(found):
                return found
        raise CohortError(
            f"A secret of a node that vanished cannot be rebuilt from {len(places)} shares, of "
            f"which {self._threshold} right ones are needed: the round is lost."
        )


def _survivor_secrets(
    transcript: Transcript, node: str, holders: _Holders
) -> tuple[bytes, Sequence[bytes]]:
    reveal = transcript.reveals.get(node)
    if reveal is not None:
        return reveal.seed, reveal.increments
    rebuilt = [
        holders.rebuild(node, "survivors", at, _is_committed(transcript, node, at))
        for at in range(1 + len(transcript.removed))
    ]
    return rebuilt[0], rebuilt[1:]


def _is_committed(transcript: Transcript, node: str, at: int) -> Callable[[bytes], bool]:
    """Whether a secret is the one committed to: 0 the seed, then the increments that come off."""
    part = transcript.removed[at - 1] if at else -1
    label = f"increment {part}" if at else "seed"
    committed = transcript.commitments[node][part + 1]

    def right(secret: bytes) -> bool:
        found = shares.commit(secret, plan=transcript.plan.digest, node=node, label=label)
        return hmac.compare_digest(found, committed)

    return right


def _is_private_key(transcript: Transcript, node: str) -> Callable[[bytes], bool]:
    public = transcript.adverts[node].mask_key
    return lambda private: hmac.compare_digest(masks.public_key(private), public)


def _increment(plan: RoundPlan, part: int, seed: bytes) -> NDArray[np.uint64]:
    if plan.schedule is None:
        raise ProtocolError("The round has no noise to take off.")
    noise = plan.schedule.increment(part, dimension=plan.dimension, seed=seed)
    return noise.astype(np.uint64)


def _pair_masks(transcript: Transcript, gone: str, private: bytes) -> NDArray[np.uint64]:
    """What survivors' vectors still carry of their masks with one who vanished."""
    plan = transcript.plan
    left = np.zeros(plan.dimension, dtype=np.uint64)
    for node in transcript.survivors:
        key = masks.pair_mask_key(
            private, transcript.adverts[node].mask_key, plan=plan.digest, own=gone, peer=node
        )
        mask = masks.expand(key, dimension=plan.dimension, modulus_bits=plan.modulus_bits)
        left += mask if node < gone else -mask
    return left
