"""Messages to nodes and back, by stage and deadline, over Flower's grid.

Flower's `send_and_receive` sleeps for three seconds between looks; here a look costs a tenth of
that at most, and a stage ends when all have answered or its time is over.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx
import structlog
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from federated.app.client_app import content_of, payload_of

_LOG = structlog.get_logger("federated.grid")
_FIRST_LOOK_S: Final = 0.03
_LONGEST_PAUSE_S: Final = 0.3
_TIMEOUT_S: Final = 5.0
_SENDERS: Final = 4


class OwnGrid(HttpGrid):
    """Flower's grid with the coordinator's client certificate, and no endless retries."""

    def __init__(self, address: str, *, tls: ssl.SSLContext, token: str) -> None:
        super().__init__(runtime_api_address=address, token=token)
        self._client = RuntimeHttpClient(
            f"https://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                RuntimeTokenHttpInterceptor(token=token),
            ],
            verify=tls,
            timeout=_TIMEOUT_S,
        )
        self.client = self._client


class GridExchange:
    """Asks nodes, by Flower's ids. `clock` and `sleep` are in seconds, the clock monotonic."""

    def __init__(
        self,
        grid: Grid,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid = grid
        self._clock = clock
        self._sleep = sleep

    def ask(
        self, stage: str, payloads: Mapping[int, bytes], *, timeout_s: float
    ) -> dict[int, bytes]:
        """Send each node its bytes and return what came back within `timeout_s`.

        Never raises for what a node does, or for a SuperLink that is away: who did not answer, or
        answered with an error or in another form, is not in what is returned.
        """
        deadline = self._clock() + timeout_s
        messages = {
            node: Message(
                content_of(stage, payload), node, "query", ttl=timeout_s + 1.0, group_id=stage
            )
            for node, payload in payloads.items()
        }
        waiting = self._push(messages, deadline)
        answers: dict[int, bytes] = {}
        pause_s = _FIRST_LOOK_S
        while waiting and self._clock() < deadline:
            self._sleep(min(pause_s, max(0.0, deadline - self._clock())))
            came = self._look(waiting)
            for message in came:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                payload = _read(message, stage)
                if node is not None and payload is not None:
                    answers[node] = payload
            pause_s = _FIRST_LOOK_S if came else min(pause_s * 1.5, _LONGEST_PAUSE_S)
        return answers

    def _push(self, messages: Mapping[int, Message], deadline: float) -> dict[str, int]:
        """Return message id → node for what the SuperLink took.

        One by one, so that a node can begin while others' messages are still on their way.
        """
        with ThreadPoolExecutor(max_workers=_SENDERS) as pool:
            ids = list(
                pool.map(lambda message: self._push_one(message, deadline), messages.values())
            )
        return {id_: node for id_, node in zip(ids, messages, strict=True) if id_}

    def _push_one(self, message: Message, deadline: float) -> str:
        while True:
            try:
                return next(iter(self._grid.push_messages([message])), "") or ""
            except (httpx.HTTPError, OSError, ValueError) as error:
                _LOG.warning("federated.grid.push_failed", error=type(error).__name__)
                if self._clock() >= deadline:
                    return ""
            self._sleep(_LONGEST_PAUSE_S)

    def _look(self, waiting: Iterable[str]) -> list[Message]:
        try:
            return list(self._grid.pull_messages(list(waiting)))
        except (httpx.HTTPError, OSError, ValueError, TypeError) as error:
            # Away for a moment, or restarted; what it has in its database it still has.
            _LOG.warning("federated.grid.pull_failed", error=type(error).__name__)
            return []


def _read(message: Message, stage: str) -> bytes | None:
    if message.has_error():
        return None
    try:
        answered, payload = payload_of(message.content)
    except (ValueError, TypeError):
        return None
    return payload if answered == stage else None
