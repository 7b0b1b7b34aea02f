"""The node's side of one round: a state machine, request in, answer out.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(2017), figure 4, with what it adds against an active server. What the server sends is hostile: one
request out of order, of another round, or that an honest server could not send, and the round is
over here: the secrets are dropped and every later request is refused.

What this side guarantees stands in DESIGN.md under "Proof obligations"; each is numbered there and
named here where it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from federated.aggregation import masks, shares
from federated.aggregation.encoding import pack, to_residues
from federated.aggregation.messages import (
    Advert,
    Adverts,
    Begin,
    Box,
    Consent,
    Consents,
    Delivered,
    Masked,
    Message,
    PeerShares,
    Reveal,
    Shares,
    Survivors,
    advert_text,
    adverts_digest,
    box_context,
    consent_text,
    encode,
    increment_count,
    parse,
    secret_count,
    unique,
)
from federated.aggregation.plan import RoundPlan
from federated.errors import ProtocolError
from federated.model import RandomBits

#: Gives the node's vector; asked once, when enough others have shared and masks stand.
type Contribution = Callable[[], NDArray[np.int64]]


class Client(Protocol):
    """A node in a round, with masks (`SecureClient`) or without (`trusted.TrustedClient`)."""

    @property
    def finished(self) -> bool:
        """Whether the round is over for this node, answered or given up."""
        ...

    def answer(self, request: bytes) -> bytes:
        """Answer the server's next request. Raises `ProtocolError`, and the round is over."""
        ...


@dataclass(slots=True, kw_only=True)
class _Secrets:
    mask_private: bytes = field(repr=False)
    seal_private: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    increments: tuple[bytes, ...] = field(repr=False)


class SecureClient:
    """One node in one round. Not to be used again, whatever came of it."""

    def __init__(
        self,
        *,
        plan: RoundPlan,
        node: str,
        identity: Ed25519PrivateKey,
        contribution: Contribution,
        random: RandomBits,
        minimum_people: int = 0,
    ) -> None:
        """`plan` was approved by the device's guard; `identity` is the key it is enrolled with.

        `minimum_people` is this node's own smallest cohort; the plan's holds beside it. Raises
        `ProtocolError` if this node is not on the roster with this key, or the plan is not for
        secure aggregation.
        """
        if plan.trust_model != "secure_aggregation":
            raise ProtocolError("The plan trusts the server: this node takes part with masks only.")
        if plan.roster.get(node) != identity.public_key().public_bytes_raw():
            raise ProtocolError("This node is not on the round's roster with its own key.")
        self._plan = plan
        self._node = node
        self._identity = identity
        self._contribution = contribution
        self._random = random
        self._minimum_people = max(minimum_people, plan.minimum_people)
        self._secrets: _Secrets | None = None
        self._adverts: dict[str, Advert] = {}
        self._shared: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()
        self._held: dict[str, list[bytes]] = {}
        self._next = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the round is over for this node; no secret of it is left then."""
        return self._finished

    def answer(self, request: bytes) -> bytes:
        """Answer the server's next request. Raises `ProtocolError`, and the round is over."""
        if self._finished:
            raise ProtocolError("This round is over for this node: it answers nothing more.")
        steps: tuple[Callable[[bytes], Message], ...] = (
            self._advertise, self._share, self._mask, self._agree, self._reveal,
        )  # fmt: skip
        step = steps[self._next]
        # Counted before the step, so that a request is answered at most once whatever happens.
        self._next += 1
        completed = False
        try:
            reply = encode(step(request))
            completed = True
        finally:
            if not completed or self._next == len(steps):
                self._drop()
        return reply

    def _drop(self) -> None:
        self._finished = True
        self._secrets = None
        self._held = {}

    def _advertise(self, request: bytes) -> Advert:
        parse(Begin, request, self._plan)
        fresh = [self._random.bits(256).to_bytes(32) for _ in range(3 + self._increment_count)]
        self._secrets = _Secrets(
            mask_private=fresh[0],
            seal_private=fresh[1],
            seed=fresh[2],
            increments=tuple(fresh[3:]),
        )
        mask_key, seal_key = masks.public_key(fresh[0]), masks.public_key(fresh[1])
        text = advert_text(self._plan, self._node, mask_key, seal_key)
        signature = self._identity.sign(text)
        self._adverts = {
            self._node: Advert(self._plan.digest, self._node, mask_key, seal_key, signature)
        }
        return self._adverts[self._node]

    def _share(self, request: bytes) -> Shares:
        adverts = parse(Adverts, request, self._plan).adverts
        self._check_adverts(adverts)
        self._adverts = {advert.node: advert for advert in adverts}
        mine = self._mine
        places = {node: at for at, node in enumerate(self._plan.nodes)}
        split = [
            shares.split(secret, threshold=self._plan.threshold, holders=len(places))
            for secret in (mine.mask_private, mine.seed, *mine.increments)
        ]
        boxes = [
            self._seal(peer, [column[places[peer]] for column in split])
            for peer in sorted(self._adverts)
            if peer != self._node
        ]
        labels = ("seed", *(f"increment {part}" for part in range(self._increment_count)))
        commitments = tuple(
            shares.commit(secret, plan=self._plan.digest, node=self._node, label=label)
            for secret, label in zip((mine.seed, *mine.increments), labels, strict=True)
        )
        return Shares(self._plan.digest, self._node, commitments, tuple(boxes))

    def _mask(self, request: bytes) -> Masked:
        boxes = parse(Delivered, request, self._plan).boxes
        senders = unique((box.peer for box in boxes), "those who shared")
        if not senders <= self._adverts.keys() - {self._node}:
            raise ProtocolError("Somebody shared who did not advertise, or this node itself.")
        self._shared = senders | {self._node}
        self._enough(self._shared, self._plan.minimum_survivors, "shared")
        self._enough_people(self._shared, "shared")
        for box in boxes:
            # A box that does not open costs its sender a share, not everybody the round: without
            # it this node reveals less, never more.
            try:
                self._held[box.peer] = self._unseal(box)
            except ProtocolError:
                continue
        vector = self._noisy_vector()
        for peer in senders:
            mask = self._pair_mask(peer)
            vector += mask if self._node < peer else -mask
        key = masks.self_mask_key(self._mine.seed, plan=self._plan.digest, node=self._node)
        vector += self._expand(key)
        bits = self._plan.modulus_bits
        packed = pack(vector & np.uint64((1 << bits) - 1), bits)
        return Masked(self._plan.digest, self._node, packed)

    def _agree(self, request: bytes) -> Consent:
        listed = parse(Survivors, request, self._plan).nodes
        self._survivors = unique(listed, "survivors")
        if self._node not in self._survivors or not self._survivors <= self._shared:
            raise ProtocolError(
                "The survivors do not hold this node, or hold one who never shared."
            )
        self._enough(self._survivors, self._plan.minimum_survivors, "survived")
        self._enough_people(self._survivors, "survived")
        return Consent(self._plan.digest, self._node, self._identity.sign(self._told))

    def _reveal(self, request: bytes) -> Reveal:
        consents = parse(Consents, request, self._plan).consents
        signers = unique((consent.node for consent in consents), "those who agreed")
        if not signers <= self._survivors:
            raise ProtocolError("Somebody agreed who is not among the survivors.")
        self._enough(signers, self._plan.threshold, "agreed")
        for consent in consents:
            self._verify(consent.node, consent.signature, self._told)
        off = self._removed
        kinds = {peer: self._shares_of(peer, off) for peer in sorted(self._held)}
        return Reveal(
            self._plan.digest,
            self._node,
            self._mine.seed,
            tuple(self._mine.increments[part] for part in off),
            tuple(kinds[peer] for peer in kinds if peer in self._survivors),
            tuple(kinds[peer] for peer in kinds if peer not in self._survivors),
        )

    def _shares_of(self, peer: str, off: tuple[int, ...]) -> PeerShares:
        """Either what unmasks a survivor, or the mask key of one who vanished: never both."""
        mask_key, seed, *increments = self._held[peer]
        if peer in self._survivors:
            return PeerShares(peer, (seed, *(increments[part] for part in off)))
        return PeerShares(peer, (mask_key,))

    @property
    def _mine(self) -> _Secrets:
        if self._secrets is None:
            raise ProtocolError("This round's secrets are gone.")
        return self._secrets

    @property
    def _increment_count(self) -> int:
        return increment_count(self._plan)

    @property
    def _removed(self) -> tuple[int, ...]:
        schedule = self._plan.schedule
        return schedule.removed(len(self._survivors)) if schedule else ()

    @property
    def _told(self) -> bytes:
        return consent_text(
            self._plan,
            adverts=adverts_digest(tuple(self._adverts.values())),
            shared=self._shared,
            survivors=self._survivors,
        )

    def _check_adverts(self, adverts: tuple[Advert, ...]) -> None:
        nodes = unique((advert.node for advert in adverts), "those who advertised")
        self._enough(nodes, self._plan.minimum_survivors, "advertised")
        if self._adverts[self._node] not in adverts:
            raise ProtocolError("This node's own advert is missing or changed.")
        keys = [key for advert in adverts for key in (advert.mask_key, advert.seal_key)]
        if len(set(keys)) != len(keys):
            raise ProtocolError("Two round keys are the same.")
        for advert in adverts:
            text = advert_text(self._plan, advert.node, advert.mask_key, advert.seal_key)
            self._verify(advert.node, advert.signature, text)

    def _verify(self, node: str, signature: bytes, text: bytes) -> None:
        key = self._plan.roster.get(node)
        if key is None:
            raise ProtocolError("A node takes part that is not on the roster.")
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, text)
        except InvalidSignature as error:
            raise ProtocolError("A signature is not by the node it names, over this.") from error

    def _enough(self, nodes: frozenset[str], needed: int, what: str) -> None:
        if len(nodes) < needed:
            raise ProtocolError(f"Only {len(nodes)} nodes {what}; this node asks for {needed}.")

    def _enough_people(self, nodes: frozenset[str], what: str) -> None:
        """A server that leaves nodes out must not get the sum over fewer people than promised."""
        people = self._plan.speak_for(nodes)
        if people < self._minimum_people:
            raise ProtocolError(
                f"Nodes of {people} people {what}; this node asks for {self._minimum_people}."
            )

    def _seal(self, peer: str, parts: list[bytes]) -> Box:
        key = self._box_key(peer, sender=self._node, receiver=peer)
        context = box_context(self._plan, sender=self._node, receiver=peer)
        return Box(peer, shares.seal(key, parts, context=context))

    def _unseal(self, box: Box) -> list[bytes]:
        key = self._box_key(box.peer, sender=box.peer, receiver=self._node)
        context = box_context(self._plan, sender=box.peer, receiver=self._node)
        return shares.unseal(key, box.data, context=context, count=secret_count(self._plan))

    def _box_key(self, peer: str, *, sender: str, receiver: str) -> bytes:
        return masks.sealing_key(
            self._mine.seal_private,
            self._adverts[peer].seal_key,
            plan=self._plan.digest,
            sender=sender,
            receiver=receiver,
        )

    def _pair_mask(self, peer: str) -> NDArray[np.uint64]:
        key = masks.pair_mask_key(
            self._mine.mask_private,
            self._adverts[peer].mask_key,
            plan=self._plan.digest,
            own=self._node,
            peer=peer,
        )
        return self._expand(key)

    def _expand(self, key: bytes) -> NDArray[np.uint64]:
        plan = self._plan
        return masks.expand(key, dimension=plan.dimension, modulus_bits=plan.modulus_bits)

    def _noisy_vector(self) -> NDArray[np.uint64]:
        """The node's vector with its share of the noise, as residues."""
        plan, schedule = self._plan, self._plan.schedule
        vector = checked(self._contribution(), plan) * plan.granularity
        if schedule is not None:
            vector += schedule.share(-1, dimension=plan.dimension, random=self._random)
            for part, seed in enumerate(self._mine.increments):
                vector += schedule.increment(part, dimension=plan.dimension, seed=seed)
        return to_residues(vector, plan.modulus_bits)


def checked(vector: NDArray[np.int64], plan: RoundPlan) -> NDArray[np.int64]:
    """Return the node's own vector, within the plan's bound.

    What lies beyond is brought back to the bound: were it refused, whether an answer comes would
    tell of rows, without any noise. Raises `ProtocolError` for another length or type, which follow
    from the query alone.
    """
    if vector.shape != (plan.dimension,) or vector.dtype != np.int64:
        raise ProtocolError("The node's own vector is not of the plan's length and type.")
    return vector.clip(-plan.bound, plan.bound)
