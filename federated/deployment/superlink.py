"""The SuperLink's process: Flower's own server, behind the gate, with mutual TLS on its HTTP port.

Started by `federated.deployment.processes` as `python -m federated.deployment.superlink FILE`. It
builds Flower's application from Flower's own parts and settings instead of through the command
`flower-superlink`, because that command cannot ask a caller of the Control API who he is. Nothing
is sent to Flower's makers: telemetry and update checks hang on the command, which is not run.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import msgspec

from federated.deployment.gate import Gate, RunConfiguration, StartRule
from federated.errors import DeploymentError, FederatedError

#: Larger messages of nodes are refused. A masked vector of 10,000 values is 80 kB.
LARGEST_MESSAGE_BYTES: Final = 16 * 1024 * 1024
#: A call makes some thousand objects, nearly all of which are gone without a collection.
_COLLECT: Final = (50_000, 20, 20)
#: Middleware of Flower's for logins of people, licences and event logs: none of which are served.
_IDLE: Final = frozenset(
    {"ControlSensitiveResponseMiddleware", "ControlLicenseMiddleware", "ControlEventLogMiddleware"}
)


class SuperLinkFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the process is told, as the JSON file that it is started with.

    Paths are absolute. `coordinator_name` is the DNS name in the coordinator's client certificate.
    `trust_file` names who may approve studies (`federated.deployment.trust`).
    """

    host: str
    http_port: int
    fleet_port: int
    certificate_file: str
    key_file: str
    ca_file: str
    database: str
    control_secret_file: str
    executor_secret_file: str
    coordinator_name: str
    trust_file: str


def parse_start(body: bytes) -> tuple[str, RunConfiguration]:
    """Return bundle hash and run configuration of a start request, whole.

    Raises `DeploymentError` for anything that is not a plain run of a bundle that lies in the
    request: stored apps, apps from Flower's hub, prompts, connectors, simulation.
    """
    from hashlib import sha256

    from flwr.common.serde import user_config_from_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from google.protobuf.message import DecodeError

    request = StartRunRequest()
    try:
        request.ParseFromString(body)
        configuration = dict(user_config_from_proto(request.override_config))
    except (DecodeError, ValueError) as error:
        raise DeploymentError("The request to start a run is malformed.") from error
    plain = StartRunRequest(fab=request.fab, override_config=request.override_config)
    # Byte by byte: what Flower reads is then exactly what was looked at here.
    if plain.SerializeToString(deterministic=True) != body or not request.fab.content:
        raise DeploymentError("A run is started with its bundle and configuration alone.")
    return sha256(request.fab.content).hexdigest(), configuration


def _replace(module: Any, name: str, value: object) -> None:
    if not hasattr(module, name):
        raise DeploymentError(
            f"This version of Flower keeps {name} elsewhere: install one that Havengate was tested "
            "with (1.39)."
        )
    setattr(module, name, value)


def application(files: SuperLinkFiles, rule: StartRule) -> Gate:
    """Return Flower's application behind the gate."""
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    from federated.deployment.lean_state import LeanLinkState

    # The package's attribute of this name is the command.
    flower: Any = import_module("flwr.superlink.cli.flower_superlink")
    # Flower takes 2 GiB from whoever can open a connection.
    _replace(flower, "GRPC_MAX_MESSAGE_LENGTH", LARGEST_MESSAGE_BYTES)
    state: Any = import_module("flwr.server.superlink.linkstate.linkstate_factory")
    _replace(state, "SqlLinkState", LeanLinkState)
    paths = (files.ca_file, files.certificate_file, files.key_file)
    authority, certificate, key = (Path(path).read_bytes() for path in paths)
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=files.host,
        port=files.http_port,
        insecure=False,
        certificates=(authority, certificate, key),
        superexec_auth_secret=Path(files.executor_secret_file).read_bytes(),
        # Who calls was asked by the gate, and by TLS before it.
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=f"{files.host}:{files.fleet_port}",
        simulation=False,
        ssl_ca_certfile=files.ca_file,
        ssl_certfile=files.certificate_file,
        ssl_keyfile=files.key_file,
        database=files.database,
        # The ServerApp runs in the coordinator's process: Flower starts none.
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, flower.SuperLinkLifespan)
    # Each of these takes a task of its own per call, and has nothing to do here.
    app.user_middleware = [
        one for one in app.user_middleware if getattr(one.cls, "__name__", "") not in _IDLE
    ]
    return Gate(
        app,
        secret=Path(files.control_secret_file).read_bytes(),
        rule=rule,
        parse_start=parse_start,
    )


def coordinator_only(name: str) -> type[Any]:
    """Return uvicorn's protocol, but closed to clients whose certificate does not carry `name`.

    Trailers (RFC 9112, 7.1.2) are dropped.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class CoordinatorOnly(HttpToolsProtocol):
        """One connection, dropped before its first byte is read unless the coordinator's."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            secured = transport.get_extra_info("ssl_object")
            names = secured.getpeercert().get("subjectAltName", ()) if secured else ()
            if ("DNS", name) not in names:
                transport.abort()

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def on_header(self, name: bytes, value: bytes) -> None:
            # What stands behind the body is no header of the request; uvicorn makes it one.
            if self._in_head:
                super().on_header(name, value)

    return CoordinatorOnly


@contextmanager
def only_one(database: Path) -> Iterator[None]:
    """Be the one process that has this state, until the kernel sees this process end.

    What `lean_state` keeps in memory holds for the only writer. Raises `DeploymentError` at once if
    another process has it.
    """
    lock = os.open(
        database.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DeploymentError(
                f"Another SuperLink has {database} open: end it first (is havengate federated up "
                "running twice?)."
            ) from error
        yield
    finally:
        os.close(lock)


def serve(files: SuperLinkFiles, rule: StartRule) -> None:
    """Serve until SIGTERM or SIGINT."""
    import uvicorn

    app = application(files, rule)
    # Flower says a line for each message of each node.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # What is here now stays; looking through it again and again costs every call.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)
    config = uvicorn.Config(
        app,
        host=files.host,
        port=files.http_port,
        loop="uvloop",
        http=coordinator_only(files.coordinator_name),
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        log_level="warning",
        ssl_certfile=files.certificate_file,
        ssl_keyfile=files.key_file,
        ssl_ca_certs=files.ca_file,
        ssl_cert_reqs=ssl.CERT_REQUIRED,
        timeout_graceful_shutdown=5,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    uvicorn.Server(config).run()


def main(arguments: list[str]) -> int:
    """Serve what the file says; return the exit status."""
    os.umask(0o077)
    try:
        files = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=SuperLinkFiles)
        from federated.deployment.trust import ApprovedStudies

        with only_one(Path(files.database)):
            serve(files, ApprovedStudies.load(Path(files.trust_file)))
    except (OSError, msgspec.DecodeError, FederatedError) as error:
        print(f"superlink: {error}", file=sys.stderr)  # noqa: T201 - its log is its stderr
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
