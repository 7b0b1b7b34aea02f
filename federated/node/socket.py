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
_TIMEOUT_S: Final = 120.0


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
            answer = msgspec.msgpack.decode(_receive(connection), type=_Answer)
    except (OSError, msgspec.DecodeError) as error:
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
    ready = threading.Event()
    thread = threading.Thread(target=_serve, args=(listening, service, ready), daemon=True)
    thread.start()
    try:
        yield ready
    finally:
        # Wakes the thread that waits for a caller.
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        listening.close()
        path.unlink(missing_ok=True)


def _serve(listening: socket.socket, service: Service, ready: threading.Event) -> None:
    ready.set()
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(_TIMEOUT_S)
            try:
                call = msgspec.msgpack.decode(_receive(connection), type=_Call)
                payload = _answer(service, call)
                _send(connection, msgspec.msgpack.encode(_Answer(payload=payload)))
            except (OSError, msgspec.DecodeError, ProtocolError):
                _LOG.warning("federated.socket.malformed")


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


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > _LARGEST_FRAME:
        raise ProtocolError("A frame on the socket is too large.")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        part = connection.recv(min(count - len(content), 1 << 16))
        if not part:
            raise ProtocolError("The other side of the socket went away.")
        content += part
    return bytes(content)
