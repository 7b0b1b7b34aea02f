"""A witness (C2SP tlog-witness): remembers how far it saw a log, and cosigns what continues it.

Lives here: the witness's decision and its state, the HTTP server around it, and the client. A
witness belongs to another party on another machine; two stories about one log cannot both get its
signature.

`POST /add-checkpoint` answers 200 with cosignature lines; 404 unknown log; 403 no good signature;
400 malformed, or old size larger than the checkpoint's; 409 with the size it knows; 422 bad proof.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import (
    Checkpoint,
    SignedCheckpoint,
    parse_checkpoint,
    parse_size,
    verify_checkpoint,
)
from audit.errors import (
    AuditConfigurationError,
    AuditError,
    MalformedNoteError,
    VerificationError,
    WitnessError,
)
from audit.files import make_directory, read_bounded, replace_file_durably
from audit.merkle import EMPTY_ROOT, HASH_BYTES, verify_consistency
from audit.note import (
    MAX_NOTE_BYTES,
    Signature,
    VerifierKey,
    cosignature_message,
    decode_base64,
    encode_base64,
    encode_cosignature,
    parse_signature_lines,
)
from audit.ports import Signer

PATH = "/add-checkpoint"
SIZE_TYPE = "text/x.tlog.size"
MAX_PROOF_LINES = 63
MAX_BODY_BYTES = MAX_NOTE_BYTES + 4096
#: A connection that says nothing for this long is closed.
IDLE_S = 10.0
#: A request takes no longer than this, however slowly it is sent.
REQUEST_S = 30.0
#: Requests at a time; more connections are closed at once.
MAX_CONNECTIONS = 64
_MAX_STATE_BYTES = 4096
_OK, _BAD, _FORBIDDEN, _UNKNOWN, _CONFLICT, _UNPROVEN = 200, 400, 403, 404, 409, 422
_TOO_LARGE = 413


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a log asks: to cosign `checkpoint`, which continues the tree of `old_size`."""

    old_size: int
    proof: tuple[bytes, ...]
    checkpoint: bytes

    def encode(self) -> bytes:
        """The body of the POST."""
        lines = [f"old {self.old_size}", *(encode_base64(one) for one in self.proof)]
        return ("\n".join(lines) + "\n\n").encode() + self.checkpoint


def parse_request(body: bytes) -> Request:
    """Read the body of a POST. Raises `MalformedNoteError`."""
    head, empty, checkpoint = body.partition(b"\n\n")
    try:
        first, *lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise MalformedNoteError("The request is not ASCII above its checkpoint.") from error
    if not empty or not first.startswith("old "):
        raise MalformedNoteError("The request does not begin with `old <size>`.")
    if len(lines) > MAX_PROOF_LINES:
        raise MalformedNoteError(f"The proof has more than {MAX_PROOF_LINES} lines.")
    proof = tuple(decode_base64(line, what="A hash of the proof") for line in lines)
    if any(len(one) != HASH_BYTES for one in proof):
        raise MalformedNoteError("The proof holds something that is not a 32-byte hash.")
    size = parse_size(first.removeprefix("old "), what="The old size")
    return Request(old_size=size, proof=proof, checkpoint=checkpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class _Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    origin: str
    size: int
    root: str


class LocalSigner:
    """An Ed25519 key in a 0600 file, for a witness that has no key server of its own."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load_or_create(cls, path: Path) -> LocalSigner:
        """Read the 32 bytes of the private key, or make them. Raises `AuditConfigurationError`."""
        try:
            if path.stat().st_mode & 0o077:
                raise AuditConfigurationError(f"{path} is readable by others: chmod 600 it.")
            raw = read_bounded(path, 32)
        except FileNotFoundError:
            raw = Ed25519PrivateKey.generate().private_bytes_raw()
            make_directory(path.parent)
            replace_file_durably(path, raw)
        except (OSError, ValueError) as error:
            raise AuditConfigurationError(f"{path} is no witness key: {error}") from error
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(raw))
        except ValueError as error:
            raise AuditConfigurationError(f"{path} does not hold 32 bytes.") from error

    def public_keys(self) -> Mapping[int, bytes]:
        """As `keys.ports.Signer` says; there is one version."""
        return {1: self._key.public_key().public_bytes_raw()}

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """As `keys.ports.Signer` says."""
        return 1, self._key.sign(message)


class Witness:
    """The witness itself. `logs` are the verifier keys it accepts, by origin, all versions of each.

    Any thread may call it. For one log, comparing and remembering is one step, and it is durable
    before a signature is made.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        signer: Signer,
        logs: Mapping[str, Sequence[VerifierKey]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        make_directory(directory)
        self._directory = directory
        self._name = name
        self._signer = signer
        self._logs = logs
        self._clock = clock
        self._locks = {origin: threading.Lock() for origin in logs}

    def verifier_keys(self) -> tuple[VerifierKey, ...]:
        """What those who check its cosignatures have to know."""
        keys = self._signer.public_keys()
        return tuple(VerifierKey.cosigner(self._name, key) for key in keys.values())

    def add_checkpoint(self, body: bytes) -> Answer:
        """Decide about a request. Never raises for anything in `body`."""
        try:
            request = parse_request(body)
            origin = parse_checkpoint(request.checkpoint).checkpoint.origin
        except MalformedNoteError as error:
            return _problem(_BAD, str(error))
        if origin not in self._logs:
            return _problem(_UNKNOWN, "This log is not known here.")
        try:
            signed = verify_checkpoint(request.checkpoint, self._logs[origin])
        except AuditError as error:
            return _problem(_FORBIDDEN, str(error))
        if request.old_size > signed.checkpoint.size:
            return _problem(_BAD, "The old size is larger than the checkpoint's.")
        with self._locks[origin]:
            return self._compare_and_remember(request, signed.checkpoint)

    def _compare_and_remember(self, request: Request, new: Checkpoint) -> Answer:
        seen = self._read(new.origin)
        if request.old_size != seen.size or (seen.size == new.size and seen.root != new.root):
            return Answer(status=_CONFLICT, body=f"{seen.size}\n".encode(), content_type=SIZE_TYPE)
        try:
            verify_consistency(
                old_size=seen.size,
                old_root=seen.root,
                new_size=new.size,
                new_root=new.root,
                proof=request.proof,
            )
        except VerificationError as error:
            return _problem(_UNPROVEN, str(error))
        state = _Seen(origin=new.origin, size=new.size, root=encode_base64(new.root))
        replace_file_durably(self._path(new.origin), msgspec.json.encode(state))
        return Answer(status=_OK, body=self._cosign(new).line.encode())

    def _cosign(self, checkpoint: Checkpoint) -> Signature:
        time_s = int(self._clock())
        version, raw = self._signer.sign(cosignature_message(checkpoint.text, time_s))
        key = VerifierKey.cosigner(self._name, self._signer.public_keys()[version])
        signature = encode_cosignature(time_s, raw)
        key.verify(checkpoint.text, signature)
        return Signature.by(key, signature)

    def _path(self, origin: str) -> Path:
        return self._directory / f"{sha256(origin.encode()).hexdigest()}.json"

    def _read(self, origin: str) -> Checkpoint:
        """What was seen last; the empty tree at first. Raises if its own state is damaged."""
        try:
            data = read_bounded(self._path(origin), _MAX_STATE_BYTES)
        except FileNotFoundError:
            return Checkpoint(origin=origin, size=0, root=EMPTY_ROOT)
        seen = msgspec.json.decode(data, type=_Seen)
        return Checkpoint(
            origin=seen.origin, size=seen.size, root=decode_base64(seen.root, what="The root")
        )


def _problem(status: int, why: str) -> Answer:
    return Answer(status=status, body=f"{why}\n".encode())


class WitnessServer(ThreadingHTTPServer):
    """Serves a witness over HTTP/1.1, for a network or behind a TLS terminator.

    Bounded: connections at a time, bytes a request, seconds of silence. `serve_forever` runs it,
    `shutdown` and `server_close` stop it (both of the standard library).
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], witness: Witness) -> None:
        self.witness = witness
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(
        self, request: socket | tuple[bytes, socket], client_address: object
    ) -> None:
        """Take a connection if there is a free slot, else close it."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket | tuple[bytes, socket], client_address: object
    ) -> None:
        """Serve a connection, then free its slot; one that drags on is cut off."""
        connection = request[1] if isinstance(request, tuple) else request
        deadline = threading.Timer(REQUEST_S, _cut_off, [connection])
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._slots.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """A broken connection, or state that cannot be written, ends that request only."""


def _cut_off(connection: socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    timeout = IDLE_S
    protocol_version = "HTTP/1.1"
    server_version = "havengate-witness"
    sys_version = ""

    def do_POST(self) -> None:
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        if self.path != PATH:
            self._send(_problem(_UNKNOWN, f"Only POST {PATH} is served."))
        elif not length.isascii() or not length.isdigit() or "Transfer-Encoding" in self.headers:
            self._send(_problem(_BAD, "A Content-Length is needed."))
        elif len(length) > len(str(MAX_BODY_BYTES)) or int(length) > MAX_BODY_BYTES:
            self._send(_problem(_TOO_LARGE, f"At most {MAX_BODY_BYTES} bytes."))
        else:
            self._send(self.server.witness.add_checkpoint(self.rfile.read(int(length))))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        """Say nothing: what a witness has seen stands in its state."""


class WitnessClient:
    """Sends checkpoints to one witness and verifies what comes back; for one thread at a time."""

    def __init__(self, url: str, *, key: VerifierKey, timeout_s: float = 2.0) -> None:
        """`url` is what `/add-checkpoint` is appended to. Raises `AuditConfigurationError`."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise AuditConfigurationError(f"The witness's URL {url} is not http or https.")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/") + PATH
        self._key = key
        self._timeout_s = timeout_s
        self._known_size = 0

    @property
    def name(self) -> str:
        """How its cosignatures are named."""
        return self._key.name

    def cosign(
        self, signed: SignedCheckpoint, prove: Callable[[int], Sequence[bytes]]
    ) -> Sequence[Signature]:
        """Have a checkpoint cosigned. If the witness knows another size, prove again from that one.

        Raises `WitnessError`; one that speaks of a *larger* log means that this log was rolled
        back.
        """
        answer = self._ask(signed, prove)
        if answer.status == _CONFLICT:
            self._known_size = self._conflicting_size(answer, signed)
            answer = self._ask(signed, prove)
        if answer.status != _OK:
            raise WitnessError(
                f"The witness {self.name} answered {answer.status} to a checkpoint of "
                f"{signed.checkpoint.size} entries: {answer.body[:200].decode(errors='replace')!r}."
            )
        lines = self._verified(answer.body, signed)
        self._known_size = signed.checkpoint.size
        return lines

    def _verified(self, body: bytes, signed: SignedCheckpoint) -> Sequence[Signature]:
        try:
            lines = parse_signature_lines(body.decode())
            mine = [s for s in lines if (s.name, s.key_id) == (self.name, self._key.key_id)]
            for line in mine:
                self._key.verify(signed.note.text, line.signature)
        except (AuditError, UnicodeDecodeError) as error:
            raise WitnessError(f"The witness {self.name} sent no cosignature: {error}") from error
        if not mine:
            raise WitnessError(
                f"The witness {self.name} signed with another key than the configured one "
                f"({self._key.key_id.hex()}). Ask its operator for the verifier key."
            )
        return mine

    def _conflicting_size(self, answer: Answer, signed: SignedCheckpoint) -> int:
        try:
            if answer.content_type != SIZE_TYPE:
                raise MalformedNoteError("a conflict without a size")
            size = parse_size(answer.body.decode().removesuffix("\n"), what="The witness's size")
        except (AuditError, UnicodeDecodeError) as error:
            raise WitnessError(f"The witness {self.name} does not say its size.") from error
        if size > signed.checkpoint.size:
            raise WitnessError(
                f"The witness {self.name} has seen {size} entries of this log, but it has only "
                f"{signed.checkpoint.size}: the log was rolled back. Compare it with a copy."
            )
        return size

    def _ask(self, signed: SignedCheckpoint, prove: Callable[[int], Sequence[bytes]]) -> Answer:
        size = min(self._known_size, signed.checkpoint.size)
        request = Request(old_size=size, proof=tuple(prove(size)), checkpoint=signed.note.encode())
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", self._path, body=request.encode())
            response = connection.getresponse()
            body = response.read(MAX_NOTE_BYTES)
            kind = response.headers.get("Content-Type", "")
            return Answer(status=response.status, body=body, content_type=kind)
        except (OSError, http.client.HTTPException) as error:
            raise WitnessError(
                f"The witness {self.name} is out of reach ({error}). Checkpoints go on without it."
            ) from error
        finally:
            connection.close()
