"""A thread in which mitmproxy runs, started and stopped as one, for either direction.

mitmproxy's master does not run on uvloop and keeps itself in a global; so there is a thread and an
event loop for it, and never two in a process. What it would log is kept silent. After: `intercept`
(the way out) and `intercept_reverse` (in front of apps).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Final, Self

import structlog
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.master import Master
from mitmproxy.net import tls as net_tls
from mitmproxy.options import Options

from gateway.errors import GatewayConfigurationError
from gateway.frontends.intercept_guard import FailClosedAddons

_log = structlog.get_logger("gateway.outbound")

_START_TIMEOUT_S: Final = 15.0
_STOP_TIMEOUT_S: Final = 5.0


class ProxyThread(ABC):
    """The running proxy. `start` and `close`, or a context manager. One at a time in a process.

    mitmproxy keeps its master in a global: a second one would take the first one's connections out
    of its hands, and each of them would be cut.
    """

    name = "havengate-proxy"
    _one: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._master: InterceptMaster | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    @abstractmethod
    def start(self) -> object:
        """Serve in a thread, by `begin`."""

    @abstractmethod
    async def serve(self) -> None:
        """Make a master and `listen`, in the thread's loop, until closed."""

    def make_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop to run in."""
        return asyncio.SelectorEventLoop()

    def begin(self, failed: str) -> None:
        """Start the thread and return when it listens.

        Raises `GatewayConfigurationError` with `failed` if it does not, or if there is one already.
        """
        if not ProxyThread._one.acquire(blocking=False):
            raise GatewayConfigurationError(
                "Expected no other mitmproxy in this process, got one that runs. Close it first, "
                "or start this one in a process of its own."
            )
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S) or self._failure is not None:
            self.close()
            raise GatewayConfigurationError(failed) from self._failure

    def close(self) -> None:
        """Stop; what is under way is cut off and ends in the log."""
        if self._master is not None and self.alive:
            self._master.shutdown()  # type: ignore[no-untyped-call]
        if self._thread is not None:
            self._thread.join(_START_TIMEOUT_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    def _run(self) -> None:
        try:
            with _quiet(), asyncio.Runner(loop_factory=self.make_loop) as runner:
                runner.run(self.serve())
        except BaseException as error:  # noqa: BLE001 - told by `start`, or by `alive`
            self._failure = error
            _log.error("gateway.proxy_stopped", name=self.name, error=type(error).__name__)
        finally:
            ProxyThread._one.release()
            self._started.set()

    async def listen(self, master: InterceptMaster, end_all: Callable[[], Awaitable[None]]) -> None:
        """Run `master` until `close`; then `end_all` what is under way and cut what is open."""
        self._master = master
        running = asyncio.ensure_future(master.run())
        # Nothing else says that it listens.
        while not (master.proxyserver.is_running or running.done()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if not master.proxyserver.listen_addrs():
            master.shutdown()  # type: ignore[no-untyped-call]
            await running
            raise OSError("no address could be bound")
        self._started.set()
        await running
        for server in master.proxyserver.servers:
            await server.stop()
        await end_all()
        for client_id in list(master.proxyserver.connections):
            master.guard.sever(str(client_id))
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            while master.proxyserver.connections:  # noqa: ASYNC110 - nothing says that it is empty
                await asyncio.sleep(0.01)


class InterceptMaster(Master):
    """mitmproxy's master with hooks that fail closed, and without its log events."""

    def __init__(self, options: Options, *, hook_timeout_s: float) -> None:
        super().__init__(options, asyncio.get_running_loop())
        # It sends every line that any thread logs through the hooks.
        self._legacy_log_events.uninstall()
        self.addons = self.guard = FailClosedAddons(self, hook_timeout_s=hook_timeout_s)
        self.proxyserver = Proxyserver()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mitmproxy from writing what it sees: to its log, and the keys of TLS to a file.

    Its messages quote heads of requests with credentials and queries. It would also write session
    keys wherever the environment's SSLKEYLOGFILE says.
    """
    logger = logging.getLogger("mitmproxy")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
    net_tls.log_master_secret = None
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
