"""What `havengate up` runs: the parent that holds keys, log and certificate, and its workers.

The parent starts the embedded key server, is the one writer of the log, renews the certificate and
answers health and metrics. Workers (`load_worker`, by import string) join the key server, hand
their entries to the writer's socket, and serve. All have the configuration that the parent read.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import msgspec
import structlog
from cryptography import x509

from audit.errors import AuditConfigurationError
from audit.log import LogWriter
from audit.server import LogServer
from audit.transport import LogClient
from gateway import metrics
from gateway.app import Foundations, Gateway, make_handlers, public_url
from gateway.errors import GatewayConfigurationError
from gateway.fhir.links import Pager
from gateway.frontends.admin import Admin
from gateway.frontends.ingress import Ingress
from gateway.frontends.serve import check_certificate, serve
from gateway.identity.directory import Directory
from gateway.routes import OWN_PREFIX, compile_routes
from gateway.settings import GatewaySettings
from havengate.checking import check_files, readiness, upstream_problem
from havengate.configuration import FILE_VARIABLE, Configuration, load
from havengate.operational_log import configure
from havengate.outbound_process import check_outbound, way_out
from havengate.wiring import NothingRecorded, OpenKeys, new_request_id, open_keys, open_program
from keys.blindindex import BlindIndex
from keys.certificates import CertificateManager
from keys.kv import KVStore
from keys.layout import IDENTITY_SIGNING_KEY
from keys.pseudonyms import Pseudonymiser
from keys.reidentification import VaultHalves
from keys.signing import VaultSigner
from policies.store import load_in_force

_log = structlog.get_logger("gateway")

#: An exchange makes some thousand objects, nearly all of which are gone without a collection.
_COLLECT = (50_000, 20, 20)

_AS_ROOT = (
    "The gateway needs no rights of root's: whoever finds a mistake in it would have them all. Run "
    "it as a user of its own, to whom its directory belongs."
)

WORKER = "havengate.gateway_process:load_worker"

#: Nothing that the gateway makes is for others to read, whatever makes it.
_OURS_ALONE = 0o077


def foundations(settings: Configuration, keys: OpenKeys, log: LogClient) -> Foundations:
    """What a worker stands on."""
    store = keys.keyring.store
    return Foundations(
        tenant=settings.tenant,
        keyring=keys.keyring,
        index=BlindIndex(store, settings=settings.keys.index, recorder=NothingRecorded()),
        pseudonyms=Pseudonymiser(
            keys.keyring,
            database=keys.database,
            halves=VaultHalves(keys.client),
            recorder=NothingRecorded(),
        ),
        secrets=KVStore(keys.client, "gateway"),
        identity_signer=VaultSigner(keys.client, IDENTITY_SIGNING_KEY),
        log=log,
        policies=settings.policies,
        ids=new_request_id,
    )


def load_worker() -> Ingress:
    """Build one worker's application, from what the parent hands down."""
    configure()
    settings = load(Path(os.environ[FILE_VARIABLE]), os.environ)
    held = ExitStack()
    keys = held.enter_context(open_keys(settings, os.environ))
    log = LogClient(Path(settings.audit.socket))
    gateway = Gateway(settings.gateway, foundations(settings, keys, log))
    # What is here now stays; looking through it again and again would cost every exchange.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)
    app = _Holding(gateway, held)
    return Ingress(app, settings.gateway.limits, port=settings.gateway.port)


class _Holding:
    """A gateway and what it stands on, which is closed after its last exchange, and not before.

    A context manager that nobody holds on to is closed at once: keys would then stay in memory
    whatever their age.
    """

    def __init__(self, gateway: Gateway, held: ExitStack) -> None:
        self.start = gateway.start
        self.exchange = gateway.exchange
        self._gateway = gateway
        self._held = held

    async def stop(self) -> None:
        """Close both."""
        await self._gateway.stop()
        await asyncio.to_thread(self._held.close)


def check_settings(settings: GatewaySettings) -> None:
    """Raise `GatewayConfigurationError` for what is wrong in the section and the files it names."""
    if not settings.routes:
        raise GatewayConfigurationError(
            "expected at least one app in [[gateway.routes]], got none; write a first "
            "configuration with havengate init"
        )
    compile_routes(settings.routes)
    make_handlers(settings.routes, Pager(bytes(32)))
    check_outbound(settings.outbound)


def check_port(host: str, port: int, setting: str) -> None:
    """Raise `GatewayConfigurationError` if nobody can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _taken(host, port, setting, error) from error


@contextmanager
def holding_port(host: str, port: int, setting: str) -> Iterator[None]:
    """Keep the port for this gateway's own workers.

    They share it among themselves (`SO_REUSEPORT`), and so could those of another gateway of the
    same user: half of all connections would then meet other rules. Whoever binds without that
    option, as each gateway does here before its workers, is refused for as long as this is held.
    Raises `GatewayConfigurationError`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as held:
        # Only so that connections of a gateway that has just ended are not in the way.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            raise _taken(host, port, setting, error) from error
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield


def _taken(host: str, port: int, setting: str, error: OSError) -> GatewayConfigurationError:
    return GatewayConfigurationError(
        f"Nothing can listen on {host}:{port}: {error.strerror}. Stop what does, or give "
        f"{setting} another number."
    )


@contextmanager
def handed_down(settings: Configuration, file: Path) -> Iterator[None]:
    """Keep the configuration for workers that start later: the one that was checked at the start.

    Whoever edits the operator's file meanwhile changes nothing until the next start, and never has
    one gateway run by two configurations. `file` is written for our own user alone.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
        written.write(msgspec.json.encode(settings))
    fresh.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCertificate:
    """What clients are shown. Paths that are links stay the same when an issued one is renewed."""

    certificate: Path
    key: Path
    ca: Path | None
    renew: Callable[[], object] | None


def server_certificate(settings: Configuration, keys: OpenKeys) -> ServerCertificate:
    """The operator's own certificate, or one issued by the key server's authority.

    Raises `GatewayConfigurationError` or a `KeysError`.
    """
    tls = settings.gateway.tls
    if tls.certificate_file or tls.key_file:
        certificate, key = Path(tls.certificate_file), Path(tls.key_file)
        check_certificate(certificate, key)
        check_lifetime(certificate)
        return ServerCertificate(certificate=certificate, key=key, ca=None, renew=None)
    directory = Path(tls.directory)
    # Whether the key server answers is said in its own words, with its address.
    keys.client.token_ttl_s()
    manager = CertificateManager(
        keys.client,
        kind="server",
        names=certificate_names(settings.gateway),
        directory=directory,
        settings=settings.keys.pki,
    )
    manager.renew_if_due()
    current = directory / "current"
    return ServerCertificate(
        certificate=current / "certificate.pem",
        key=current / "key.pem",
        ca=current / "ca.pem",
        renew=manager.renew_if_due,
    )


def check_lifetime(certificate: Path) -> None:
    """Raise `GatewayConfigurationError` for a certificate that is not valid now."""
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = datetime.now(UTC)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise GatewayConfigurationError(
            f"The certificate {certificate} is valid from {found.not_valid_before_utc:%Y-%m-%d} to "
            f"{found.not_valid_after_utc:%Y-%m-%d}, so not today. Renew it, or remove "
            "gateway.tls.certificate_file to have one issued here."
        )


def certificate_names(settings: GatewaySettings) -> list[str | IPv4Address]:
    """Names under which people reach the gateway on this machine, and its public one."""
    names: list[str | IPv4Address] = ["localhost", IPv4Address("127.0.0.1")]
    host = urlsplit(settings.public_url).hostname
    if host and host not in names:
        names.append(host)
    return names


@contextmanager
def serving_log(writer: LogWriter, path: Path) -> Iterator[None]:
    """Serve the log's socket from a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="log-server", daemon=True)
    thread.start()
    server = LogServer(writer, path)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(timeout=10)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        loop.close()


@contextmanager
def environment_of_children(variables: Mapping[str, str]) -> Iterator[None]:
    """Tell what is started in the block, and take it back at the end.

    A variable that stayed would send the next command of this process to this gateway's files.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run(settings: Configuration, file: Path, *, say: Callable[[str], None] = print) -> None:
    """Run the gateway until it is told to stop.

    `file` is read by nobody after this: workers get what was read. Raises whatever cannot be
    mended by waiting, before the first connection is taken: a `KeysError`, `AuditError`,
    `PoliciesError` or `GatewayError`.
    """
    gateway = settings.gateway
    check_settings(gateway)
    check_files(settings, file)
    check_port("127.0.0.1", gateway.admin_port, "gateway.admin_port")
    if gateway.outbound.apps:
        check_port(gateway.outbound.host, gateway.outbound.port, "gateway.outbound.port")
    rules = len(load_in_force(settings.policies).engine.bundle.rules)
    if os.geteuid() == 0:
        _log.warning("gateway.runs_as_root", message=_AS_ROOT)
    with ExitStack() as stack:
        # Whoever shares this process afterwards gets it back as it was.
        stack.callback(os.umask, os.umask(_OURS_ALONE))
        stack.enter_context(holding_port(gateway.host, gateway.port, "gateway.port"))
        numbers = stack.enter_context(TemporaryDirectory(prefix="havengate-metrics-"))
        started_with = Path(f"{settings.audit.socket}.configuration.json")
        told = {FILE_VARIABLE: str(started_with), metrics.DIRECTORY_VARIABLE: numbers}
        stack.enter_context(environment_of_children(told))
        program = stack.enter_context(open_program(settings, os.environ))
        if program.log.writer is None:
            raise AuditConfigurationError(
                "Another process writes this log, so a gateway is running on this configuration "
                "already. Stop it, or give this one an audit.directory of its own."
            )
        # Not before: another gateway on this configuration would have its own overwritten.
        stack.enter_context(handed_down(settings, started_with))
        _open_directory_once(settings)
        shown = server_certificate(settings, program.keys)
        stack.enter_context(serving_log(program.log.writer, Path(settings.audit.socket)))
        outbound = stack.enter_context(way_out(settings, os.environ))
        admin = Admin(
            port=gateway.admin_port,
            checks=readiness(settings, program) + ([outbound.check] if outbound else []),
            metrics=lambda: metrics.exposition(Path(numbers)),
        )
        stack.enter_context(admin)
        say(f"Havengate stands at {public_url(gateway)} with {rules} rules, in front of:")
        for route in gateway.routes:
            say(f"  {route.host or '*'}{route.path}  →  {route.upstream}  ({route.kind})")
            wrong = upstream_problem(route)
            if wrong is not None:
                say(f"    not reached: {wrong}")
        if shown.ca is not None:
            say(f"Its certificate is issued here; browsers and programs trust it with {shown.ca}")
        own = f"{public_url(gateway).rstrip('/')}{OWN_PREFIX}"
        say(f"People sign in at {own} (https only: what begins with http:// gets no page)")
        if outbound is not None:
            say(outbound.says)
        say(f"Health and metrics: http://127.0.0.1:{gateway.admin_port}/readyz")
        say("Stop with Ctrl-C.")
        serve(
            gateway,
            target=WORKER,
            certificate=shown.certificate,
            key=shown.key,
            workers=gateway.workers,
            renew=shown.renew,
        )
        say("Stopping …")


def _open_directory_once(settings: Configuration) -> None:
    """Bring the database of accounts to its newest version before several workers open it."""
    identity = settings.gateway.identity
    Directory.open(identity.database_url, settings=identity.sessions, clock=time.time).close()
