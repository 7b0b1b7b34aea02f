"""The composition root of a gateway worker: settings and open foundations in, an app out.

Wired by hand. What is opened here is closed here; what `Foundations` holds is opened and closed by
whoever made it. After: `gateway.frontends.ingress` serves the app.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import structlog

from audit.recorder import AsyncAppender, AsyncRecorder
from gateway import metrics
from gateway.content.handler import ContentHandler
from gateway.core.exchange import Site, Summary, exchange
from gateway.core.handler import Handler
from gateway.core.messages import RequestHead
from gateway.facts import SOURCES, FactsSource
from gateway.fhir.handler import FHIRHandler
from gateway.fhir.links import Pager
from gateway.frontends.driver import Client, Services, drive
from gateway.frontends.upstream import Upstreams
from gateway.identity.credentials import strip
from gateway.identity.shared_secret import SharedSecret
from gateway.identity.totp import SecretStore
from gateway.identity.wiring import Identity
from gateway.protection import KeyLoader, PersonSeals, PseudonymSource, TenantSealer, sealing_ready
from gateway.routes import compile_routes
from gateway.settings import GatewaySettings, RouteSettings
from keys.blindindex import BlindIndex
from keys.keyring import Keyring
from keys.ports import Signer
from policies.errors import PoliciesError
from policies.model import ROLES
from policies.settings import PoliciesSettings
from policies.store import PolicyStore

_log = structlog.get_logger("gateway")

#: How often the folders of rules and tables are looked at for changes.
RELOAD_EVERY_S = 2.0
#: Where the secret behind paging links lies on the key server.
PAGING_SECRET = "fhir/paging"  # noqa: S105 - the path of a secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundations:
    """What a worker stands on, already open. `ids` gives the ids of exchanges."""

    tenant: str
    keyring: Keyring
    index: BlindIndex
    pseudonyms: PseudonymSource
    secrets: SecretStore = field(repr=False)
    identity_signer: Signer
    log: AsyncAppender
    policies: PoliciesSettings
    ids: Callable[[], str]


class Gateway:
    """One worker: `gateway.frontends.ingress.App`.

    Construction reads files and asks the key server; it raises a `GatewayError`, `PoliciesError` or
    `KeysError` when something is not as it must be.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        foundations: Foundations,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ids = foundations.ids
        # Looked at before they are read: a change in between is then noticed.
        self._watched = _Folders(foundations.policies)
        self._policies = PolicyStore(foundations.policies)
        self._routes = compile_routes(settings.routes)
        self._upstreams = Upstreams(self._routes)
        self._facts = FactsSource(self._routes, self._upstreams.fetch)
        sealer = TenantSealer(
            tenant=foundations.tenant,
            keyring=foundations.keyring,
            index=foundations.index,
            pseudonyms=foundations.pseudonyms,
        )
        recorder = AsyncRecorder(
            foundations.log,
            sealer=foundations.keyring,
            clock=clock,
            ids=foundations.ids,
            ready=sealing_ready(foundations.keyring),
        )
        self._identity = Identity.open(
            settings.identity,
            store=foundations.secrets,
            sealer=PersonSeals(tenant=foundations.tenant, keyring=foundations.keyring),
            signer=foundations.identity_signer,
            recorder=recorder,
            tenant=foundations.tenant,
            public_url=public_url(settings),
            clock=clock,
            roles=(*ROLES, *foundations.policies.roles),
        )
        paging = SharedSecret.open(
            foundations.secrets, PAGING_SECRET, self._identity.directory.database
        )
        self._services = Services(
            identifier=self._identity.identifier,
            facts=self._facts,
            assertions=self._identity.assertions,
            recorder=recorder,
            keys=KeyLoader(tenant=foundations.tenant, keyring=foundations.keyring, sealer=sealer),
            upstreams=self._upstreams,
            pages=self._identity.pages,
        )
        self._site = Site(
            tenant=foundations.tenant,
            routes=self._routes,
            handlers=make_handlers(settings.routes, Pager(paging.mac("links").encode())),
            in_force=lambda: self._policies.current,
            sealer=sealer,
            limits=settings.limits,
            strip=strip,
            clock=clock,
        )
        self._housekeeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Get ready, in the worker's event loop."""
        self._housekeeping = asyncio.create_task(self._keep_house())

    async def stop(self) -> None:
        """Close what was opened here."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        await self._upstreams.close()
        self._identity.close()

    async def exchange(self, head: RequestHead, client: Client) -> Summary:
        """Carry one request to its end."""
        began = time.perf_counter()
        with metrics.IN_FLIGHT.track_inprogress():
            steps = exchange(head, self._site, request=self._ids())
            try:
                summary = await drive(steps, self._services, client)
            except asyncio.CancelledError:
                metrics.FAILURES.labels("gateway.stopping").inc()
                raise
            except Exception:
                metrics.FAILURES.labels("gateway.bug").inc()
                raise
        metrics.exchanged(
            service=summary.service,
            action=summary.action,
            status=summary.status,
            decision=summary.decision,
            failure=summary.failure,
            duration_s=time.perf_counter() - began,
        )
        if summary.unlogged:
            metrics.UNLOGGED.inc()
        if head.method != "GET" and not SOURCES.isdisjoint(summary.types):
            self._forget_facts(summary.service)
        if summary.mistake is not None:
            _log.error("gateway.mistake", error=summary.mistake, service=summary.service)
        elif summary.failure is not None and summary.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("gateway.failed", code=summary.failure, service=summary.service)
        return summary

    def _forget_facts(self, service: str) -> None:
        """What relations and consents are made of has changed."""
        for route in self._routes:
            if route.name == service:
                self._facts.forget(route)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_EVERY_S)
            try:
                if await asyncio.to_thread(self._watched.settled):
                    await asyncio.to_thread(self._reload)
                    self._watched.taken()
            except Exception as error:  # noqa: BLE001 - the next round tries again
                _log.error("gateway.housekeeping_failed", error=type(error).__name__)

    def _reload(self) -> None:
        try:
            self._policies.reload()
        except PoliciesError as error:
            metrics.RULES_REFUSED.set(1)
            _log.error("policies.refused", **error.diagnostics())
            return
        metrics.RULES_REFUSED.set(0)
        in_force = self._policies.current
        _log.info("policies.in_force", hash=in_force.hash, rules=len(in_force.engine.bundle.rules))


def public_url(settings: GatewaySettings) -> str:
    """How people reach the gateway."""
    return settings.public_url or f"https://localhost:{settings.port}"


def make_handlers(settings: tuple[RouteSettings, ...], pager: Pager) -> Mapping[str, Handler]:
    """One handler for each route. Raises `GatewayConfigurationError`."""
    handlers: dict[str, Handler] = {}
    for route in settings:
        if route.content == "fhir":
            handlers[route.name] = FHIRHandler(route, pager=pager)
        else:
            handlers[route.name] = ContentHandler(route)
    return handlers


class _Folders:
    """Notices that files of rules or tables were added, removed or changed.

    A folder that is being written to has rules that nobody meant, such as all but the one that
    forbids. So a change counts once it has stood still from one look to the next.
    """

    def __init__(self, settings: PoliciesSettings) -> None:
        self._folders = [
            Path(one) for one in (settings.directory, settings.tables_directory) if one
        ]
        self._taken = self._seen = self._look()

    def settled(self) -> bool:
        """True while there is a change that stood still and was not `taken`."""
        before, self._seen = self._seen, self._look()
        return before == self._seen != self._taken

    def taken(self) -> None:
        """What was seen last has been read, or refused."""
        self._taken = self._seen

    def _look(self) -> tuple[Any, ...]:
        found = []
        for folder in self._folders:
            for file in sorted(folder.glob("*")):
                try:
                    status = file.stat()
                except FileNotFoundError:
                    continue
                found.append((file.name, status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)
