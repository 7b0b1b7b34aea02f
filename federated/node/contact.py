"""What a server sends when it wants an answer, and how it is read: strictly, within bounds.

The form only. Whether anything of it is true is for `node.guard` to find out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from federated.errors import ManifestError
from federated.signed_study import MAX_SIGNED_BYTES
from federated.study_log import MAX_BUNDLE_BYTES

MAX_NODES: Final = 10_000
MAX_PEOPLE: Final = 10**9
_KEY_BYTES: Final = 32
#: What a round may start from: the weights of the largest model, as doubles, and a clip.
MAX_GIVEN_BYTES: Final = 8 * 100_001
#: Names of nodes are short: a roster of the largest size fits.
MAX_REQUEST_BYTES: Final = MAX_SIGNED_BYTES + MAX_BUNDLE_BYTES + MAX_NODES * 256 + MAX_GIVEN_BYTES
MAX_QUESTION_BYTES: Final = MAX_SIGNED_BYTES + MAX_NODES * 256
_QUERY = re.compile(r"[a-z][a-z0-9_-]{0,63}", re.ASCII).fullmatch
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", re.ASCII).fullmatch
_SITE = re.compile(r"[a-z][a-z0-9_-]{0,63}", re.ASCII).fullmatch
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", re.ASCII).fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which answer is meant: what a greeting asks about. Parsed, not believed.

    `study` is a signed study (`SignedStudy.encode`), `query` one of its questions; `run` and
    `round_number` tell answers apart. `roster` and `sites` are those of `ContactRequest`.
    """

    study: bytes = field(repr=False)
    query: str
    run: str
    round_number: int
    roster: Mapping[str, bytes] = field(repr=False)
    sites: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The form in which it travels; `parse_question` reads it."""
        return msgspec.msgpack.encode(
            _WireQuestion(
                study=self.study,
                query=self.query,
                run=self.run,
                round_number=self.round_number,
                roster=dict(self.roster),
                sites=dict(self.sites),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactRequest:
    """One request for an answer. Parsed, not believed.

    `study` is a signed study (`SignedStudy.encode`), `proof` the proof that it was published
    (`StudyBundle.encode`). `query` is one of the study's; `run` and `round_number` tell answers
    apart. `roster` is everybody who may ever take part: node id → raw Ed25519 public key; `sites`
    says which of them speak for a site's people. `taking_part` says which of them do now, and how
    many people each says it speaks for. `given` is what the round starts from, such as weights.
    """

    study: bytes = field(repr=False)
    proof: bytes = field(repr=False)
    query: str
    run: str
    round_number: int
    roster: Mapping[str, bytes] = field(repr=False)
    taking_part: Mapping[str, int] = field(repr=False)
    sites: Mapping[str, str] = field(default_factory=dict)
    given: bytes = field(default=b"", repr=False)

    @property
    def question(self) -> Question:
        """What is asked, without who takes part now."""
        return Question(
            study=self.study,
            query=self.query,
            run=self.run,
            round_number=self.round_number,
            roster=self.roster,
            sites=self.sites,
        )

    def encode(self) -> bytes:
        """The form in which it travels; `parse_request` reads it."""
        return msgspec.msgpack.encode(
            _Wire(
                study=self.study,
                proof=self.proof,
                query=self.query,
                run=self.run,
                round_number=self.round_number,
                roster=dict(self.roster),
                taking_part=dict(self.taking_part),
                sites=dict(self.sites),
                given=self.given,
            )
        )


class _WireQuestion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    study: bytes
    query: str
    run: str
    round_number: int
    roster: dict[str, bytes]
    sites: dict[str, str] = {}


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    study: bytes
    proof: bytes
    query: str
    run: str
    round_number: int
    roster: dict[str, bytes]
    taking_part: dict[str, int]
    sites: dict[str, str] = {}
    given: bytes = b""


def parse_question(data: bytes) -> Question:
    """Read what `Question.encode` makes. Raises `ManifestError`."""
    question = Question(**_decoded(data, _WireQuestion, MAX_QUESTION_BYTES))
    verify_question(question)
    return question


def verify_question(question: Question) -> None:
    """Check names and bounds. Raises `ManifestError`."""
    if not _QUERY(question.query) or not _RUN(question.run):
        raise ManifestError("A request names its query and its run by short plain names.")
    if not 0 <= question.round_number < 2**31:
        raise ManifestError("A request's round is a number from 0.")
    if not 0 < len(question.roster) <= MAX_NODES:
        raise ManifestError(f"A roster names 1 to {MAX_NODES} nodes.")
    for node, key in question.roster.items():
        if not _NODE(node) or len(key) != _KEY_BYTES:
            raise ManifestError("A roster holds short plain names and keys of 32 bytes.")
    known = question.sites.keys() <= question.roster.keys()
    if not known or not all(map(_SITE, question.sites.values())):
        raise ManifestError("A site is named by a short plain name, and stands by a known node.")


def parse_request(data: bytes) -> ContactRequest:
    """Read what `ContactRequest.encode` makes. Raises `ManifestError`."""
    request = ContactRequest(**_decoded(data, _Wire, MAX_REQUEST_BYTES))
    verify_request(request)
    return request


def _decoded(data: bytes, wire: type[msgspec.Struct], most: int) -> dict[str, Any]:
    """The fields of a message of at most `most` bytes. Raises `ManifestError`."""
    if len(data) > most:
        raise ManifestError(f"A request has at most {most} bytes.")
    try:
        found = msgspec.msgpack.decode(data, type=wire)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError("The request is malformed.") from error
    return {name: getattr(found, name) for name in wire.__struct_fields__}


def verify_request(request: ContactRequest) -> None:
    """Check names and bounds. Raises `ManifestError`."""
    verify_question(request.question)
    if len(request.taking_part) > MAX_NODES:
        raise ManifestError(f"A round has at most {MAX_NODES} nodes.")
    if len(request.given) > MAX_GIVEN_BYTES:
        raise ManifestError(f"A round starts from at most {MAX_GIVEN_BYTES} bytes.")
    if not all(1 <= people <= MAX_PEOPLE for people in request.taking_part.values()):
        raise ManifestError("A node that takes part speaks for somebody.")
