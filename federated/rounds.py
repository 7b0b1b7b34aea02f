"""What coordinator and node must see alike about one round: its plan, its price, its messages.

Both sides derive the plan from the signed study and the request, so nothing of it has to be
believed: a coordinator with another plan has another digest, and no message of the round fits.
Pure. Before: `manifest` (the study). After: `study_run` (coordinator), `node.service` (node).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from federated.aggregation.plan import RoundPlan
from federated.errors import AccountingError, ManifestError, ProtocolError
from federated.manifest import DeclaredQuery, Study
from federated.model import PrivacyCost, Query

#: Bound, per coordinate, on the distance between the sum of nodes' shares and the planned noise.
#: `NoiseSchedule.log_ratio` is below 1e-29 for a thousand nodes, every share having variance 8.
CLOSENESS: Final = 1e-28
#: Larger messages are refused unread.
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
#: The stage before a round: who is there, how many people it speaks for, how much log it has seen.
GREET: Final = "greet"
_REPLY: Final = b"havengate/round-reply/v1\n"
_SIGNATURE_BYTES: Final = 64


def round_plan(
    study: Study,
    declared: DeclaredQuery,
    query: Query,
    *,
    round_id: str,
    taking_part: Roster,
    given: bytes = b"",
) -> RoundPlan:
    """The plan of the round. Raises `ProtocolError` if it would not protect what it should.

    `given` is what the round starts from: whoever was given something else has another plan.

    Threshold, survivors, colluding nodes, modulus, noise and the smallest cohort are those that
    were approved; `taking_part` are the nodes of this round, all from the study's roster. Where
    people take turns the smallest cohort is of those whose turn it is, so `gap` times as many.
    """
    rules = study.aggregation
    plan = RoundPlan(
        study=study.study_hash,
        round_id=round_id,
        dimension=query.dimension,
        bound=query.bound * sum(taking_part.people.values()),
        modulus_bits=rules.modulus_bits,
        roster=taking_part.keys,
        threshold=rules.threshold,
        minimum_survivors=rules.minimum_survivors,
        colluding=rules.colluding,
        noise=None if query.noised_by_node else declared.noise,
        trust_model=study.trust_model,
        question=declared.name,
        people=taking_part.people,
        minimum_people=study.minimum_cohort * query.gap,
        given=sha256(given).hexdigest() if given else "",
    )
    if plan.schedule is not None and plan.schedule.log_ratio > CLOSENESS:
        raise ProtocolError(
            f"The nodes' shares of noise are not as close to the planned noise as was accounted: "
            f"{plan.schedule.log_ratio:.1e} a coordinate, at most {CLOSENESS:g} may be. Take part "
            "with fewer nodes, or plan more noise."
        )
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The nodes of a round: their raw Ed25519 public keys, and for how many people each speaks."""

    keys: Mapping[str, bytes] = field(repr=False)
    people: Mapping[str, int] = field(repr=False)


def first_rounds(study: Study, rounds: Callable[[DeclaredQuery], int]) -> Mapping[str, int]:
    """The number of each question's first round in a run, in the study's order.

    `rounds`: how many a question takes. So a round's number says which question's it is, and which.
    """
    found, number = {}, 0
    for one in study.queries:
        found[one.name] = number
        number += rounds(one)
    return found


def answer_price(declared: DeclaredQuery, query: Query) -> PrivacyCost:
    """What the answer costs each person, all its rounds, from sensitivity and noise of a round.

    Raises `AccountingError` where there is no bound, `ManifestError` if the query reads other
    columns than declared, which are those that consent was asked for.
    """
    if query.rounds > 1 and declared.noise.mechanism != "discrete_gaussian":
        raise AccountingError(
            f"{declared.name}: several rounds are composed as discrete Gaussian releases only."
        )
    if frozenset(declared.columns) != query.columns:
        raise ManifestError(f"The query {declared.name} reads other columns than it declares.")
    closeness = 0.0
    if declared.noise.mechanism == "discrete_gaussian":
        closeness = CLOSENESS * query.dimension * query.rounds
    return query.price(declared.noise, delta=declared.delta, closeness=closeness)


class Greeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node's answer to `greet`: for how many people it would speak in this very round.

    `study` is the study's hash; with `query`, `run` and `round_number` it says which round, so that
    what was said of one question is never taken for another. `people` are those whom the node's
    guard would let in, at least 1. `log_size`: entries of the study log that the node has seen.
    """

    study: str
    query: str
    run: str
    round_number: int
    people: int
    log_size: int


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request. `contact` (`node.contact.ContactRequest`) comes with the first of a round."""

    contact: bytes
    request: bytes


def encode(message: Greeting | Ask) -> bytes:
    """Return a message's bytes."""
    return msgspec.msgpack.encode(message)


def parse[M: (Greeting, Ask)](kind: type[M], data: bytes) -> M:
    """Read a message. Raises `ProtocolError`."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"A message has at most {MAX_MESSAGE_BYTES} bytes.")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("A message is malformed.") from error


def sign_reply(
    key: Ed25519PrivateKey, payload: bytes, *, run_id: int, stage: str, request: bytes
) -> bytes:
    """Return a node's answer under its signature: nobody else can give it, nor give it elsewhere.

    Flower proves who a node is for each call, but takes a reply's sender from the reply.
    """
    text = _reply_text(payload, run_id=run_id, stage=stage, request=request)
    return key.sign(text) + payload


def open_reply(key: bytes, reply: bytes, *, run_id: int, stage: str, request: bytes) -> bytes:
    """Return what a node answered. Raises `ProtocolError` if it is not that node's, to this."""
    if len(reply) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"A reply has at most {MAX_MESSAGE_BYTES} bytes.")
    signature, payload = reply[:_SIGNATURE_BYTES], reply[_SIGNATURE_BYTES:]
    text = _reply_text(payload, run_id=run_id, stage=stage, request=request)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, text)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(
            "A reply is not by the node that was asked, to what it was asked."
        ) from (error)
    return payload


def _reply_text(payload: bytes, *, run_id: int, stage: str, request: bytes) -> bytes:
    parts = (str(run_id), stage, sha256(request).hexdigest(), sha256(payload).hexdigest())
    return _REPLY + "\n".join(parts).encode()
