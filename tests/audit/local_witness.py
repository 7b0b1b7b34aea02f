"""A witness in this process, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from audit.checkpoint import SignedCheckpoint
from audit.errors import WitnessError
from audit.note import Signature, VerifierKey, parse_signature_lines
from audit.witness import LocalSigner, Request, Witness
from tests.audit.conftest import ORIGIN

NAME = "witness.example"


def local_witness(directory: Path, keys: Sequence[VerifierKey]) -> Witness:
    signer = LocalSigner.load_or_create(directory / "key")
    return Witness(directory / "seen", name=NAME, signer=signer, logs={ORIGIN: keys})


class DirectWitness:
    """Asks a witness without HTTP."""

    name = NAME

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._size = 0

    def cosign(
        self, signed: SignedCheckpoint, prove: Callable[[int], Sequence[bytes]]
    ) -> Sequence[Signature]:
        request = Request(
            old_size=self._size, proof=tuple(prove(self._size)), checkpoint=signed.note.encode()
        )
        answer = self._witness.add_checkpoint(request.encode())
        if answer.status != 200:
            raise WitnessError(answer.body.decode())
        self._size = signed.checkpoint.size
        return parse_signature_lines(answer.body.decode())
