"""Publishing: a signed checkpoint over what is integrated, then the witnesses' cosignatures.

Lives here: when a checkpoint is made, what must be true before it is signed and before it is
written. Not here: the bytes (`audit.checkpoint`), talking to a witness (`audit.witness`).

Order: everything the checkpoint covers is durable, then it is signed, then the signature is proven
to fit, then it replaces the one before. A signer that is away delays only this: entries go on being
sequenced and integrated, and the next checkpoint covers them all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from audit.checkpoint import Checkpoint, SignedCheckpoint, parse_checkpoint, signed_checkpoint
from audit.errors import LogFullError, LogTamperedError, VerificationError, WitnessError
from audit.files import replace_file_durably
from audit.hold import as_halt
from audit.journal import NO_ROOM
from audit.log import LogWriter
from audit.note import Signature
from audit.ports import Signer
from audit.recovery import CHECKPOINT, read_checkpoint


class Witness(Protocol):
    """Another party that remembers how large the log was. `audit.witness.WitnessClient` is one."""

    @property
    def name(self) -> str:
        """How its cosignatures are named."""
        ...

    def cosign(
        self, signed: SignedCheckpoint, prove: Callable[[int], Sequence[bytes]]
    ) -> Sequence[Signature]:
        """Verified cosignatures. `prove(old_size)` makes the consistency proof from that size.

        Raises `WitnessError`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishStatus:
    """How publishing is doing. Errors are of the last attempt; None where it worked."""

    size: int
    published_at_s: float | None
    error: str | None
    witness_errors: Mapping[str, str]


class Publisher:
    """Publishes one log: every `interval_s` in a thread after `start`, or once with `publish`."""

    def __init__(
        self,
        writer: LogWriter,
        signer: Signer,
        *,
        interval_s: float = 1.0,
        witnesses: Sequence[Witness] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._writer = writer
        self._signer = signer
        self._interval_s = interval_s
        self._witnesses = witnesses
        self._clock = clock
        self._path: Path = writer.directory / CHECKPOINT
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._public_keys: Mapping[int, bytes] = {}
        self._signed = self._continue()
        # Witnesses that have not cosigned the checkpoint that stands.
        self._missing = [] if self._signed is None else list(witnesses)
        self._cut: Checkpoint | None = None
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(max(1, len(witnesses)), thread_name_prefix="audit-witness")
        self._published_at_s: float | None = None
        self._error: str | None = None
        self._witness_errors: dict[str, str] = {}

    def _continue(self) -> SignedCheckpoint | None:
        found = read_checkpoint(self._writer.directory)
        if found is None:
            return None
        signed = parse_checkpoint(found[0])
        # A crash may have come between the checkpoint and the removal of old partial tiles.
        self._writer.integrator.sweep(signed.checkpoint.size)
        return signed

    def start(self) -> Self:
        """Publish every `interval_s` until `close`."""
        self._thread = threading.Thread(target=self._loop, name="audit-publish", daemon=True)
        self._thread.start()
        return self

    def publish(self) -> Checkpoint | None:
        """Publish what is sequenced now and have it cosigned; return the checkpoint that stands.

        Raises a `KeysError` while the signer is away, `VerificationError` if its signature does not
        fit, `LogFullError` or `LogTamperedError`. A witness's failure is told by `status` only.
        """
        with self._lock:
            if self._grew():
                try:
                    self._publish()
                except (LogTamperedError, OSError) as error:
                    self._writer.halt(as_halt(error))
                    raise
            if self._missing:
                self._collect()
            return None if self._signed is None else self._signed.checkpoint

    def _publish(self) -> None:
        if self._cut is None:
            size, root = self._writer.integrator.cut()
            self._cut = Checkpoint(origin=self._writer.origin, size=size, root=root)
            self._check_continues(self._cut)
        # While the signer is away the same cut is tried again: each leaves partial tiles behind.
        signed = self._sign(self._cut)
        size, self._cut = self._cut.size, None
        self._write(signed)
        self._published_at_s = self._clock()
        self._missing = list(self._witnesses)
        self._writer.integrator.sweep(size)

    def status(self) -> PublishStatus:
        """How it is going."""
        return PublishStatus(
            size=self._size,
            published_at_s=self._published_at_s,
            error=self._error,
            witness_errors=dict(self._witness_errors),
        )

    @property
    def _size(self) -> int:
        return 0 if self._signed is None else self._signed.checkpoint.size

    def close(self) -> None:
        """Stop the thread. What was not published is, after the next start."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self.publish()
            except Exception as error:  # noqa: BLE001 - publishing goes on, and status tells
                self._error = f"{type(error).__name__}: {error}"
            else:
                self._error = None

    def _grew(self) -> bool:
        return self._signed is None or self._writer.size > self._size

    def _check_continues(self, checkpoint: Checkpoint) -> None:
        """Never sign a tree that is smaller than the one before, or that does not continue it."""
        if self._size == 0 or self._signed is None:
            return
        before = self._signed.checkpoint
        if checkpoint.size < before.size:
            raise LogTamperedError(
                f"{self._path}: it covers {before.size} entries, "
                f"but only {checkpoint.size} are there."
            )
        if self._writer.integrator.tree_root(before.size) != before.root:
            raise LogTamperedError(
                f"{self._path}: the tiles do not continue the {before.size} entries it covers."
            )

    def _sign(self, checkpoint: Checkpoint) -> SignedCheckpoint:
        version, signature = self._signer.sign(checkpoint.text.encode())
        if version not in self._public_keys:
            self._public_keys = dict(self._signer.public_keys())
        return signed_checkpoint(
            checkpoint, version=version, signature=signature, public_keys=self._public_keys
        )

    def _write(self, signed: SignedCheckpoint) -> None:
        try:
            replace_file_durably(self._path, signed.note.encode())
        except OSError as error:
            if error.errno in NO_ROOM:
                raise LogFullError(f"No room for {self._path}. Free some space.") from error
            raise
        self._signed = signed

    def _collect(self) -> None:
        """Ask at once all witnesses that have not cosigned yet; add what they sign."""
        signed = self._signed
        if signed is None:
            return
        prove = self._prover(signed.checkpoint.size)
        asked = [(w, self._pool.submit(w.cosign, signed, prove)) for w in self._missing]
        self._missing = []
        lines: list[Signature] = []
        for witness, answer in asked:
            try:
                lines += answer.result()
            except (WitnessError, VerificationError) as error:
                self._witness_errors[witness.name] = str(error)
                self._missing.append(witness)
            else:
                self._witness_errors.pop(witness.name, None)
        if lines:
            note = signed.note.with_signatures(lines)
            self._write(SignedCheckpoint(checkpoint=signed.checkpoint, note=note))

    def _prover(self, size: int) -> Callable[[int], Sequence[bytes]]:
        return lambda old_size: self._writer.integrator.proof(old_size, size)
