"""The node's service for a neighbour on the same machine: Flower's own SuperNode, at a clinic.

A stock `flower-supernode` starts a process for each message and runs what the SuperLink sent it.
That process must hold nothing: it hands the bytes to this socket, and the service behind it (its
own user's, with store, keys and guard) answers. Frames are four bytes of length and msgpack.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import structlog

from federated.errors import DeploymentError, FederatedError, ProtocolError
from federated.manifest import ConfigValue
from federated.node.agent import RunFacts, Service
from federated.rounds import MAX_MESSAGE_BYTES

_LOG = structlog.get_logger("federated.socket")
#: Names the socket for the ClientApp's process.
VARIABLE: Final = "HAVENGATE_NODE_SOCKET"
_LENGTH: Final = struct.Struct(">I")
_LARGEST_FRAME: Final = MAX_MESSAGE_BYTES + 65_536
#: How long a caller waits for an answer: the guard may read thousands of people's rows.
_TIMEOUT_S: Final = 120.0
#: How long a whole frame may take to come or go: whoever dawdles keeps all others waiting.
_FRAME_S: Final = 10.0
#: How often, at least, the service may give up a round that nobody goes on with.
_TIDY_S: Final = 5.0
_PAUSE_S: Final = 0.2


class _Call(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    run_id: int
    configuration: dict[str, bool | int | float | str]
    stage: str
    payload: bytes


class _Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    payload: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the ClientApp's process was given."""

    run_id: int
    configuration: Mapping[str, ConfigValue]
    stage: str
    payload: bytes = field(repr=False)


def ask(asked: Asked) -> bytes:
    """Have this machine's service answer. Raises `DeploymentError` if it refuses or is away."""
    path = os.environ.get(VARIABLE)
    if not path:
        raise DeploymentError(f"{VARIABLE} does not name the socket of this node's service.")
    call = _Call(
        run_id=asked.run_id,
        configuration=dict(asked.configuration),
        stage=asked.stage,
        payload=asked.payload,
    )
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(path)
            _send(connection, msgspec.msgpack.encode(call))
            answer = msgspec.msgpack.decode(_receive(connection, _TIMEOUT_S), type=_Answer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, ProtocolError) as error:
        raise DeploymentError("This node's service cannot be reached through its socket.") from (
            error
        )
    if answer.payload is None:
        raise DeploymentError("This node's service refused.")
    return answer.payload


@contextmanager
def serving(path: Path, service: Service) -> Iterator[threading.Event]:
    """Serve on a Unix socket, mode 0600, until left. One call at a time, in a thread of its own.

    `service` is made for one thread: nothing else may use it meanwhile. Yields an event that is set
    when the socket is served.
    """
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    finally:
        os.umask(before)
    listening.listen(16)
    listening.settimeout(_TIDY_S)
    ready, ending = threading.Event(), threading.Event()
    thread = threading.Thread(target=_serve, args=(listening, service, ready, ending), daemon=True)
    thread.start()
    try:
        yield ready
    finally:
        ending.set()
        # Wakes the thread that waits for a caller.
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        listening.close()
        path.unlink(missing_ok=True)


def _serve(
    listening: socket.socket, service: Service, ready: threading.Event, ending: threading.Event
) -> None:
    """Serve one caller after the other: nothing that one of them does ends it."""
    ready.set()
    while not ending.is_set():
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            _tidy(service)
            continue
        except OSError as error:
            if not ending.is_set():
                # A caller that went away at once, or too many open files: both pass.
                _LOG.warning("federated.socket.not_accepted", error=type(error).__name__)
                ending.wait(_PAUSE_S)
            continue
        with connection:
            _serve_one(connection, service)


def _serve_one(connection: socket.socket, service: Service) -> None:
    try:
        call = msgspec.msgpack.decode(_receive(connection, _FRAME_S), type=_Call)
        payload = _answer(service, call)
        connection.settimeout(_FRAME_S)
        _send(connection, msgspec.msgpack.encode(_Answer(payload=payload)))
    except Exception as error:  # noqa: BLE001 - of whatever kind, it ends this connection alone
        _LOG.warning("federated.socket.malformed", error=type(error).__name__)


def _tidy(service: Service) -> None:
    try:
        service.tidy()
    except Exception as error:  # noqa: BLE001 - the next call must find somebody here
        _LOG.error("federated.socket.bug", error=type(error).__name__)


def _answer(service: Service, call: _Call) -> bytes | None:
    facts = RunFacts(run_id=call.run_id, configuration=call.configuration)
    try:
        return service.respond(facts, call.stage, call.payload)
    except FederatedError as error:
        _LOG.warning("federated.socket.refused", **error.diagnostics())
    except Exception as error:  # noqa: BLE001 - a service that dies takes all its people with it
        _LOG.error("federated.socket.bug", error=type(error).__name__)
    return None


def _send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket, timeout_s: float) -> bytes:
    """One frame, whole, within the time. Raises `OSError` or `ProtocolError`."""
    deadline = time.monotonic() + timeout_s
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    if length > _LARGEST_FRAME:
        raise ProtocolError("A frame on the socket is too large.")
    return _exactly(connection, length, deadline)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    content = bytearray()
    while len(content) < count:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("A frame on the socket did not come in time.")
        connection.settimeout(left_s)
        part = connection.recv(min(count - len(content), 1 << 16))
        if not part:
            raise ProtocolError("The other side of the socket went away.")
        content += part
    return bytes(content)
