"""The server's side of one round: a state machine, answers in, requests out.

Honest nodes and an honest network are not assumed: an answer that is malformed, late or missing
makes its sender a drop-out from then on, and the round goes on with the rest, or ends with
`CohortError` when they are too few. Time is not known here: who calls decides when a stage has
waited long enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from federated.aggregation.encoding import unpack
from federated.aggregation.messages import (
    Advert,
    Adverts,
    Begin,
    Box,
    Consent,
    Consents,
    Delivered,
    Masked,
    Reveal,
    Shares,
    Survivors,
    advert_text,
    adverts_digest,
    consent_text,
    encode,
    increment_count,
    parse,
    secret_count,
)
from federated.aggregation.plan import RoundPlan
from federated.aggregation.shares import sealed_bytes
from federated.aggregation.unmask import Transcript, unmask, verify_reveal
from federated.errors import CohortError, ProtocolError
from federated.model import NoisePlan, TrustModel


class Stage(StrEnum):
    """Where a round stands: whose answers are awaited."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONSISTENCY = "consistency"
    UNMASK = "unmask"
    DONE = "done"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """The sum that a round gives.

    - `total`: of the survivors' vectors, with noise, shape (dimension,).
    - `survivors`: whose vectors are in it.
    - `noise`: what the plan promised against `colluding` nodes; None for a round without.
    - `noise_weight`: how many times the plan's variance the sum carries, at least 1 and about
      survivors / (survivors - colluding): for error bars.
    - `log_ratio`: see `NoiseSchedule.log_ratio`: for the accountant.
    """

    total: NDArray[np.int64]
    survivors: tuple[str, ...]
    noise: NoisePlan | None
    noise_weight: float
    log_ratio: float
    trust_model: TrustModel


class Server(Protocol):
    """The server of a round, with masks (`SecureServer`) or without (`trusted.TrustedServer`)."""

    @property
    def stage(self) -> Stage:
        """Whose answers are awaited."""
        ...

    @property
    def dropped(self) -> Mapping[str, str]:
        """Nodes that dropped out: at which stage and why, in a few words."""
        ...

    def requests(self) -> dict[str, bytes]:
        """What to send to whom at this stage; empty when the round is over."""
        ...

    def collect(self, replies: Mapping[str, bytes]) -> None:
        """Take this stage's answers, by the node that the transport says they came from.

        Goes on to the next stage. Raises `CohortError` when too few are left: the round is over.
        """
        ...

    def result(self) -> RoundResult:
        """Return the sum. Raises `ProtocolError` before the round is done."""
        ...


class SecureServer:
    """One round of secure aggregation."""

    def __init__(self, plan: RoundPlan) -> None:
        if plan.trust_model != "secure_aggregation":
            raise ProtocolError("The plan is not for secure aggregation.")
        self._plan = plan
        self._stage = Stage.ADVERTISE
        self._dropped: dict[str, str] = {}
        self._adverts: dict[str, Advert] = {}
        self._commitments: dict[str, Sequence[bytes]] = {}
        self._boxes: dict[str, dict[str, bytes]] = {}
        self._masked: dict[str, NDArray[np.uint64]] = {}
        self._consents: dict[str, Consent] = {}
        self._reveals: dict[str, Reveal] = {}
        self._total: NDArray[np.int64] | None = None

    @property
    def stage(self) -> Stage:
        """Whose answers are awaited."""
        return self._stage

    @property
    def dropped(self) -> Mapping[str, str]:
        """Nodes that dropped out: at which stage and why, in a few words."""
        return self._dropped

    def requests(self) -> dict[str, bytes]:
        """What to send to whom at this stage; empty when the round is over."""
        plan = self._plan.digest
        match self._stage:
            case Stage.ADVERTISE:
                return dict.fromkeys(self._plan.nodes, encode(Begin(plan)))
            case Stage.SHARE:
                return dict.fromkeys(
                    self._adverts, encode(Adverts(plan, tuple(self._adverts.values())))
                )
            case Stage.MASK:
                return {node: self._delivery(node) for node in self._boxes}
            case Stage.CONSISTENCY:
                return dict.fromkeys(self._masked, encode(Survivors(plan, tuple(self._masked))))
            case Stage.UNMASK:
                agreed = Consents(plan, tuple(self._consents.values()))
                return dict.fromkeys(self._consents, encode(agreed))
            case Stage.DONE | Stage.ABORTED:
                return {}

    def collect(self, replies: Mapping[str, bytes]) -> None:
        """Take this stage's answers and go on to the next stage.

        Raises `CohortError` when too few are left: the round is over. Answers of nodes that were
        not asked are ignored.
        """
        minimum, threshold = self._plan.minimum_survivors, self._plan.threshold
        stages: dict[Stage, tuple[Callable[[str, bytes], None], int, Stage]] = {
            Stage.ADVERTISE: (self._take_advert, minimum, Stage.SHARE),
            Stage.SHARE: (self._take_shares, minimum, Stage.MASK),
            Stage.MASK: (self._take_masked, minimum, Stage.CONSISTENCY),
            Stage.CONSISTENCY: (self._take_consent, threshold, Stage.UNMASK),
            Stage.UNMASK: (self._take_reveal, threshold, Stage.DONE),
        }
        if self._stage not in stages:
            raise ProtocolError(f"The round is {self._stage}: nothing more is collected.")
        take, needed, after = stages[self._stage]
        asked = sorted(self.requests())
        taken = [node for node in asked if self._taken(take, node, replies.get(node))]
        if len(taken) < needed:
            stopped, self._stage = self._stage, Stage.ABORTED
            raise CohortError(
                f"{len(taken)} of {len(asked)} nodes answered at stage `{stopped}`, "
                f"{needed} are needed: the round is over, nothing is released."
            )
        if self._stage in {Stage.ADVERTISE, Stage.SHARE, Stage.MASK}:
            self._verify_people(taken)
        if after is Stage.DONE:
            self._finish()
        self._stage = after

    def _verify_people(self, nodes: Sequence[str]) -> None:
        """Every node would refuse the next stage: with so few people nothing more is asked."""
        people, least = self._plan.speak_for(nodes), self._plan.minimum_people
        if people < least:
            self._stage = Stage.ABORTED
            raise CohortError(
                f"{people} people take part; at least {least} must, so that nobody stands out. "
                "Nothing is released."
            )

    def _finish(self) -> None:
        try:
            self._total = unmask(self._transcript())
        except CohortError:
            self._stage = Stage.ABORTED
            raise

    def result(self) -> RoundResult:
        """Return the sum. Raises `ProtocolError` before the round is done."""
        if self._total is None:
            raise ProtocolError(f"The round is at stage `{self._stage}`: there is no sum.")
        schedule = self._plan.schedule
        return RoundResult(
            total=self._total,
            survivors=tuple(sorted(self._masked)),
            noise=self._plan.noise,
            noise_weight=float(schedule.weight(len(self._masked))) if schedule else 0.0,
            log_ratio=schedule.log_ratio if schedule else 0.0,
            trust_model=self._plan.trust_model,
        )

    def _taken(self, take: Callable[[str, bytes], None], node: str, reply: bytes | None) -> bool:
        if reply is None:
            self._dropped[node] = f"{self._stage}: no answer"
            return False
        try:
            take(node, reply)
        except ProtocolError as error:
            self._dropped[node] = f"{self._stage}: {error}"
            return False
        return True

    def _take_advert(self, node: str, reply: bytes) -> None:
        advert = parse(Advert, reply, self._plan)
        _same(node, advert.node)
        known = {key for a in self._adverts.values() for key in (a.mask_key, a.seal_key)}
        if advert.mask_key == advert.seal_key or {advert.mask_key, advert.seal_key} & known:
            raise ProtocolError("The round keys are not its own.")
        text = advert_text(self._plan, node, advert.mask_key, advert.seal_key)
        self._verify(node, advert.signature, text)
        self._adverts[node] = advert

    def _take_shares(self, node: str, reply: bytes) -> None:
        shares = parse(Shares, reply, self._plan)
        _same(node, shares.node)
        boxes = {box.peer: box.data for box in shares.boxes}
        if len(boxes) != len(shares.boxes) or boxes.keys() != self._adverts.keys() - {node}:
            raise ProtocolError("The shares are not one box for each other node that advertised.")
        size = sealed_bytes(secret_count(self._plan))
        if any(len(data) != size for data in boxes.values()):
            raise ProtocolError(f"A box has not {size} bytes.")
        if len(shares.commitments) != 1 + increment_count(self._plan):
            raise ProtocolError("There is not one commitment for each secret.")
        self._boxes[node] = boxes
        self._commitments[node] = shares.commitments

    def _take_masked(self, node: str, reply: bytes) -> None:
        masked = parse(Masked, reply, self._plan)
        _same(node, masked.node)
        plan = self._plan
        try:
            self._masked[node] = unpack(
                masked.values, dimension=plan.dimension, modulus_bits=plan.modulus_bits
            )
        except ValueError as error:
            raise ProtocolError(f"The masked vector is wrong: {error}.") from error

    def _take_consent(self, node: str, reply: bytes) -> None:
        consent = parse(Consent, reply, self._plan)
        _same(node, consent.node)
        text = consent_text(
            self._plan,
            adverts=adverts_digest(tuple(self._adverts.values())),
            shared=frozenset(self._boxes),
            survivors=frozenset(self._masked),
        )
        self._verify(node, consent.signature, text)
        self._consents[node] = consent

    def _take_reveal(self, node: str, reply: bytes) -> None:
        reveal = parse(Reveal, reply, self._plan)
        _same(node, reveal.node)
        verify_reveal(self._transcript(), reveal)
        self._reveals[node] = reveal

    def _verify(self, node: str, signature: bytes, text: bytes) -> None:
        try:
            Ed25519PublicKey.from_public_bytes(self._plan.roster[node]).verify(signature, text)
        except InvalidSignature as error:
            raise ProtocolError("The signature is not by its node, over this.") from error

    def _delivery(self, node: str) -> bytes:
        boxes = [Box(sender, self._boxes[sender][node]) for sender in self._boxes if sender != node]
        return encode(Delivered(self._plan.digest, tuple(boxes)))

    def _transcript(self) -> Transcript:
        return Transcript(
            plan=self._plan,
            adverts=self._adverts,
            commitments=self._commitments,
            shared=frozenset(self._boxes),
            masked=self._masked,
            reveals=self._reveals,
        )


def _same(expected: str, named: str) -> None:
    if named != expected:
        raise ProtocolError("The answer names another node than the one it came from.")
