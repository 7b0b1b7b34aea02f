"""What may reach the SuperLink's HTTP port, decided before Flower reads a byte of it.

Flower serves its Control API (start a run, register a node) and its Runtime API (what a ServerApp
does) on one port, and its open-source edition asks nobody who he is. Here: a short list of paths,
everything else is as if it were not there; a shared secret on each control call; and a run starts
only with a study that whoever must approve it has signed, for exactly the run configuration and the
bundle of that study. A call comes in one form only, the one that our own client sends: what could
be read in two ways (an encoded body, an escaped path, a header twice) is read in none; what stands
behind the body is dropped before (`superlink`). Pure ASGI, so that it also sees what is refused.
Flower's own checks (task tokens, the executor's signed requests) come after it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, Protocol

import structlog

from federated.errors import FederatedError

_LOG = structlog.get_logger("federated.gate")

type Scope = MutableMapping[str, Any]
type Event = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[Event]]
type Send = Callable[[Event], Awaitable[None]]
type App = Callable[[Scope, Receive, Send], Awaitable[None]]
type RunConfiguration = Mapping[str, bool | int | float | str]

START_RUN: Final = "/v1/control/start-run"
#: Carries the signed study, base64, with a request to start a run.
STUDY_HEADER: Final = b"x-havengate-study"
PROTOBUF: Final = b"application/protobuf"
_CONTROL: Final = frozenset(
    {
        START_RUN,
        "/v1/control/stop-run",
        "/v1/control/register-node",
        "/v1/control/unregister-node",
        "/v1/control/list-nodes",
    }
)
#: What a ServerApp needs. Not here: creating tasks, automations, connectors, models, chat.
_RUNTIME: Final = frozenset(
    f"/v1/runtime/{name}"
    for name in (
        "pull-pending-tasks",
        "claim-task",
        "send-task-heartbeat",
        "pull-task-input",
        "push-task-output",
        "push-messages",
        "pull-messages",
        "push-object",
        "pull-object",
        "confirm-message-received",
        "get-nodes",
    )
)
_LARGEST_START_BYTES: Final = 1024 * 1024
_LARGEST_CONTROL_BYTES: Final = 64 * 1024
#: A batch of messages has 1 MiB, or one message of at most 8 MiB.
_LARGEST_RUNTIME_BYTES: Final = 16 * 1024 * 1024
#: What would make a body mean something else than its bytes.
_ENCODINGS: Final = frozenset({b"content-encoding", b"grpc-encoding"})
_ONCE: Final = frozenset({b"content-type", b"authorization", STUDY_HEADER})


class StartRule(Protocol):
    """Decides whether a run may start."""

    def verify_start(
        self, evidence: bytes, *, bundle_hash: str, configuration: RunConfiguration
    ) -> None:
        """Raise `FederatedError` unless `evidence` is an approved study of exactly this run."""
        ...


class Gate:
    """Stands in front of the SuperLink's application.

    `secret` is the coordinator's, for the control paths; the runtime paths carry Flower's own
    proofs. `parse_start` turns the body of a start request into the bundle's hash and the run
    configuration, and raises `FederatedError` for one that asks for anything else besides.
    """

    def __init__(
        self,
        app: App,
        *,
        secret: bytes,
        rule: StartRule,
        parse_start: Callable[[bytes], tuple[str, RunConfiguration]],
    ) -> None:
        self._app = app
        self._secret = secret
        self._rule = rule
        self._parse_start = parse_start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer that there is nothing."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] != "POST":
            await _refuse(scope, send, 404, "only the coordinator's calls are served")
            return
        path = scope.get("path", "")
        if path not in _RUNTIME | _CONTROL or not _is_plain(scope):
            await _refuse(scope, send, 404, "this call is not served, or not in this form")
        elif path in _CONTROL and not self._is_coordinator(scope):
            await _refuse(scope, send, 401, "the coordinator's secret is missing or wrong")
        else:
            await self._inspect(scope, receive, send)

    def _is_coordinator(self, scope: Scope) -> bool:
        offered = _header(scope, b"authorization")
        return hmac.compare_digest(offered, b"Bearer " + self._secret.hex().encode())

    async def _inspect(self, scope: Scope, receive: Receive, send: Send) -> None:
        starts = scope["path"] == START_RUN
        body = await _read(receive, _largest(scope["path"]))
        if body is None:
            await _refuse(scope, send, 413, "the request is too large")
            return
        if starts:
            try:
                self._verify(scope, body)
            except FederatedError as error:
                _LOG.warning("federated.start.refused", **error.diagnostics(), reason=str(error))
                await _refuse(scope, send, 403, "no approved study for this run")
                return
        await self._app(scope, _replay(body), send)

    def _verify(self, scope: Scope, body: bytes) -> None:
        bundle_hash, configuration = self._parse_start(body)
        try:
            evidence = base64.b64decode(_header(scope, STUDY_HEADER), validate=True)
        except binascii.Error:
            evidence = b""
        self._rule.verify_start(evidence, bundle_hash=bundle_hash, configuration=configuration)


def _is_plain(scope: Scope) -> bool:
    """Whether a request has the one form that the gate and what is behind it read alike."""
    names = [name for name, _ in scope["headers"]]
    return (
        scope.get("http_version") == "1.1"
        and scope.get("raw_path", b"") == scope["path"].encode()
        and not scope.get("query_string")
        and not scope.get("root_path")
        and _header(scope, b"content-type") == PROTOBUF
        and _ENCODINGS.isdisjoint(names)
        and all(names.count(name) <= 1 for name in _ONCE)
    )


def _largest(path: str) -> int:
    if path == START_RUN:
        return _LARGEST_START_BYTES
    return _LARGEST_CONTROL_BYTES if path in _CONTROL else _LARGEST_RUNTIME_BYTES


def _header(scope: Scope, name: bytes) -> bytes:
    """Return the header that is there exactly once, else nothing."""
    found = [bytes(value) for key, value in scope["headers"] if key == name]
    return found[0] if len(found) == 1 else b""


async def _read(receive: Receive, most: int) -> bytes | None:
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        body += event.get("body", b"")
        if len(body) > most:
            return None
        if not event.get("more_body", False):
            return bytes(body)


def _replay(body: bytes) -> Receive:
    events = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Event:
        return next(events, {"type": "http.disconnect"})

    return receive


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"Refused: {reason}.\n".encode()})
