"""The messages of each stage, as msgpack, and what signatures cover.

Every message names the plan's hash, and with it study, round and roster; its tag is its stage.
Parsing is strict: exact types, sizes bounded before and after, nothing extra, no double ids.

    stage         server asks          node answers
    advertise     Begin                Advert
    share         Adverts              Shares
    mask          Delivered            Masked
    consistency   Survivors            Consent
    unmask        Consents             Reveal
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import msgspec

from federated.aggregation.plan import RoundPlan
from federated.aggregation.shares import SECRET_BYTES, SHARE_BYTES, sealed_bytes
from federated.errors import ProtocolError

type Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
type Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
type Secret = Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
type Share = Annotated[bytes, msgspec.Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
type Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
type NodeId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]

_DOMAIN: Final = b"havengate/secagg/v1\n"
#: Room for ids, lengths and tags, a node.
_OVERHEAD: Final = 512


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every message starts with."""

    plan: Digest


class Begin(Message, frozen=True, tag="begin"):
    """The round starts."""


class Advert(Message, frozen=True, tag="advert"):
    """A node's round keys (X25519: for masks, for sealing), signed with its enrolled key."""

    node: NodeId
    mask_key: Key
    seal_key: Key
    signature: Signature


class Adverts(Message, frozen=True, tag="adverts"):
    """Who advertised."""

    adverts: tuple[Advert, ...]


class Box(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Sealed shares for, or from, `peer`."""

    peer: NodeId
    data: bytes


class Shares(Message, frozen=True, tag="shares"):
    """A node's secrets, shared among all that advertised.

    Commitments for the server to check (self-mask seed first, then increments), and one box for
    each peer.
    """

    node: NodeId
    commitments: tuple[Digest, ...]
    boxes: tuple[Box, ...]


class Delivered(Message, frozen=True, tag="delivered"):
    """The boxes that others sealed for this node. Their senders and it are who shared."""

    boxes: tuple[Box, ...]


class Masked(Message, frozen=True, tag="masked"):
    """A node's masked, noisy vector: packed residues."""

    node: NodeId
    values: bytes


class Survivors(Message, frozen=True, tag="survivors"):
    """Whose masked vectors came: those that the sum will be made of."""

    nodes: tuple[NodeId, ...]


class Consent(Message, frozen=True, tag="consent"):
    """A node's signature over whom it was told advertised, shared and survived."""

    node: NodeId
    signature: Signature


class Consents(Message, frozen=True, tag="consents"):
    """The signatures of all that gave one."""

    consents: tuple[Consent, ...]


class PeerShares(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Shares that a node holds of `peer`'s secrets."""

    peer: NodeId
    shares: tuple[Share, ...]


class Reveal(Message, frozen=True, tag="reveal"):
    """What unmasks the sum.

    `seed` and `increments`: the node's own self-mask seed and seeds of the increments that come
    off. `survivors`: its shares of the same of every other survivor. `vanished`: its share of the
    mask key of everybody who shared but did not survive. Nobody is in both.
    """

    node: NodeId
    seed: Secret
    increments: tuple[Secret, ...]
    survivors: tuple[PeerShares, ...]
    vanished: tuple[PeerShares, ...]


class Plain(Message, frozen=True, tag="plain"):
    """Trusted server only: a node's vector as it is, packed residues."""

    node: NodeId
    values: bytes


def encode(message: Message) -> bytes:
    """Return the message as bytes."""
    return msgspec.msgpack.encode(message)


def parse[M: Message](kind: type[M], data: bytes, plan: RoundPlan) -> M:
    """Return the message. Raises `ProtocolError` unless it is a `kind` of this very round."""
    if len(data) > largest_message(plan):
        raise ProtocolError(f"A message of {len(data)} bytes is longer than any of this round.")
    try:
        message = msgspec.msgpack.decode(data, type=kind, strict=True)
    except (msgspec.DecodeError, ValueError) as error:
        expected = kind.__name__.lower()
        raise ProtocolError(f"Expected a message `{expected}`, got something else.") from error
    if message.plan != plan.digest:
        raise ProtocolError("The message is of another round or another plan.")
    return message


def largest_message(plan: RoundPlan) -> int:
    """Bytes of the largest message that an honest peer sends in this round."""
    secrets = secret_count(plan)
    per_node = sealed_bytes(secrets) + secrets * (SHARE_BYTES + SECRET_BYTES + 16) + _OVERHEAD
    return plan.dimension * 8 + len(plan.nodes) * per_node + _OVERHEAD


def secret_count(plan: RoundPlan) -> int:
    """Secrets that a node shares: mask key, self-mask seed, one seed an increment."""
    return 2 + increment_count(plan)


def increment_count(plan: RoundPlan) -> int:
    """Increments of noise that a node adds."""
    return len(plan.schedule.increments) if plan.schedule else 0


def unique(ids: Iterable[str], what: str) -> frozenset[str]:
    """Return the ids as a set. Raises `ProtocolError` if one comes twice."""
    listed = list(ids)
    if len(found := frozenset(listed)) != len(listed):
        raise ProtocolError(f"A node stands twice among {what}.")
    return found


def advert_text(plan: RoundPlan, node: str, mask_key: bytes, seal_key: bytes) -> bytes:
    """Return what an advert's signature covers."""
    return _DOMAIN + b"advertise\n" + plan.digest + node.encode() + b"\n" + mask_key + seal_key


def adverts_digest(adverts: Sequence[Advert]) -> bytes:
    """Return a hash over who advertised which keys."""
    listed = sorted((advert.node, advert.mask_key, advert.seal_key) for advert in adverts)
    return hashlib.sha256(msgspec.msgpack.encode(listed)).digest()


def consent_text(
    plan: RoundPlan, *, adverts: bytes, shared: frozenset[str], survivors: frozenset[str]
) -> bytes:
    """Return what a consent's signature covers: what a node was told at every stage.

    `adverts` is `adverts_digest`; the server's lists, sorted.
    """
    told = hashlib.sha256(msgspec.msgpack.encode([sorted(shared), sorted(survivors)])).digest()
    return _DOMAIN + b"consistency\n" + plan.digest + adverts + told


def box_context(plan: RoundPlan, *, sender: str, receiver: str) -> bytes:
    """Return what a sealed box is bound to."""
    return _DOMAIN + b"share\n" + plan.digest + f"{sender}\n{receiver}".encode()
