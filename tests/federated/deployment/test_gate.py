"""Nobody but the coordinator, and nothing but an approved study, gets past the SuperLink's port."""

from __future__ import annotations

import base64
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import ClaimTaskRequest, PullPendingTasksRequest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from federated.app.bundle import installed_bundle
from federated.coordinator import link_access
from federated.deployment.fleet import FleetAccess, FleetConnection
from federated.deployment.gate import STUDY_HEADER
from federated.deployment.superlink import parse_start
from federated.errors import DeploymentError
from federated.signed_study import SignedStudy
from keys.certificates import CertificateManager
from keys.errors import CertificateError
from keys.layout import COORDINATOR_NAME
from keys.settings import PkiSettings
from tests.federated.deployment.federation import Running
from tests.openbao import RunningServer

PROTOBUF = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}


def client_of(federation: Running, *, secret: bool = True) -> httpx.Client:
    """An HTTP client with the coordinator's certificate, and its secret."""
    access = link_access(federation.places, address=address_of(federation))
    headers = dict(PROTOBUF)
    if secret:
        token = federation.places.control_secret.read_bytes().hex()
        headers["authorization"] = f"Bearer {token}"
    return httpx.Client(
        verify=access.tls(), base_url=f"https://{access.address}", headers=headers, timeout=20
    )


def address_of(federation: Running) -> str:
    return f"127.0.0.1:{federation.federation.ports.http}"


def start(
    federation: Running,
    signed: SignedStudy | bytes,
    *,
    secret: bool = True,
    headers: Mapping[str, str] | None = None,
    **changes: object,
) -> httpx.Response:
    """Ask for a run of a study, changed as said."""
    bundle = installed_bundle()
    evidence = signed if isinstance(signed, bytes) else signed.encode()
    configuration = {} if isinstance(signed, bytes) else signed.study.run_configuration()
    fields = {
        "fab": Fab(hash_str=bundle.hash, content=bundle.content),
        "override_config": user_config_to_proto(dict(configuration)),
    } | changes
    with client_of(federation, secret=secret) as client:
        return client.post(
            "/v1/control/start-run",
            content=StartRunRequest(**fields).SerializeToString(deterministic=True),
            headers={
                STUDY_HEADER.decode(): base64.b64encode(evidence).decode(),
                **(headers or {}),
            },
        )


def answers(federation: Running, context: ssl.SSLContext) -> bool:
    """Whether one byte of HTTP comes back."""
    host, port = "127.0.0.1", federation.federation.ports.http
    try:
        with (
            socket.create_connection((host, port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            secured.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            return bool(secured.recv(1))
    except (ssl.SSLError, OSError):
        return False


def authority(federation: Running) -> Path:
    return federation.places.tls("superlink") / "current" / "ca.pem"


def test_an_outsider_without_a_certificate_gets_no_answer(federation: Running) -> None:
    assert not answers(federation, ssl.create_default_context(cafile=str(authority(federation))))


def test_a_nodes_certificate_is_not_the_coordinators(
    federation: Running, openbao: RunningServer, tmp_path: Path
) -> None:
    with openbao.client("node") as vault:
        manager = CertificateManager(
            vault,
            kind="node",
            names=("node-1.havengate.internal",),
            directory=tmp_path / "tls",
            settings=PkiSettings(),
        )
        manager.renew_if_due()
    issued = manager.current()
    context = ssl.create_default_context(cafile=str(authority(federation)))
    context.load_cert_chain(issued.certificate_file, issued.key_file)
    assert not answers(federation, context)


def certificate(openbao: RunningServer, folder: Path, *, role: Any, kind: Any, name: str) -> Path:
    """The directory of a certificate that a role of the key server can have."""
    with openbao.client(role) as vault:
        manager = CertificateManager(
            vault, kind=kind, names=(name,), directory=folder / "tls", settings=PkiSettings()
        )
        manager.renew_if_due()
    return manager.current().certificate_file.parent


@pytest.mark.parametrize(
    ("role", "kind"), [("node", "node"), ("node", "coordinator"), ("gateway", "server")]
)
@pytest.mark.parametrize("name", [COORDINATOR_NAME, f"a.{COORDINATOR_NAME}", "*.internal"])
def test_nobody_else_can_have_a_certificate_with_the_coordinators_name(
    openbao: RunningServer, tmp_path: Path, role: str, kind: str, name: str
) -> None:
    with pytest.raises(CertificateError):
        certificate(openbao, tmp_path, role=role, kind=kind, name=name)


@pytest.mark.parametrize("name", ["node-1.havengate.internal", "havengate.internal", "localhost"])
def test_the_coordinators_role_has_certificates_in_its_own_name_alone(
    openbao: RunningServer, tmp_path: Path, name: str
) -> None:
    with pytest.raises(CertificateError):
        certificate(openbao, tmp_path, role="coordinator", kind="coordinator", name=name)


def test_a_servers_certificate_authenticates_no_client(
    federation: Running, openbao: RunningServer, tmp_path: Path
) -> None:
    name = "node-1.havengate.internal"
    issued = certificate(openbao, tmp_path, role="gateway", kind="server", name=name)
    context = ssl.create_default_context(cafile=str(authority(federation)))
    context.load_cert_chain(issued / "certificate.pem", issued / "key.pem")
    assert not answers(federation, context)


def test_nothing_starts_without_the_coordinators_secret(federation: Running) -> None:
    assert start(federation, federation.approved(), secret=False).status_code == 401


def test_nothing_starts_without_a_study(federation: Running) -> None:
    assert start(federation, b"").status_code == 403


def test_nothing_starts_that_the_ethics_board_did_not_sign(federation: Running) -> None:
    signed = federation.approved()
    short = SignedStudy(
        study=signed.study,
        signatures=tuple(one for one in signed.signatures if one.role != "ethics-board"),
    )
    assert start(federation, short).status_code == 403


def test_nothing_starts_with_a_tampered_study(federation: Running) -> None:
    raw = federation.approved().encode()
    tampered = raw.replace(b'minimum_cohort\\":6', b'minimum_cohort\\":2')
    assert tampered != raw
    assert start(federation, tampered).status_code == 403


def test_nothing_starts_with_another_run_configuration(federation: Running) -> None:
    signed = federation.approved()
    changed = {**signed.study.run_configuration(), "study-id": "another"}
    response = start(federation, signed, override_config=user_config_to_proto(changed))
    assert response.status_code == 403


def test_nothing_starts_with_another_bundle(federation: Running) -> None:
    other = installed_bundle().content + b"\0"
    response = start(federation, federation.approved(), fab=Fab(content=other))
    assert response.status_code == 403


@pytest.mark.parametrize(
    "headers", [{"content-type": "application/json"}, {"content-encoding": "gzip"}]
)
def test_a_start_in_another_form_is_refused(federation: Running, headers: dict[str, str]) -> None:
    signed = federation.approved()
    assert start(federation, signed, headers=headers).status_code == 404


def test_a_start_with_anything_appended_is_refused() -> None:
    whole = StartRunRequest(fab=Fab(content=b"x")).SerializeToString(deterministic=True)
    assert parse_start(whole)[1] == {}
    # An unknown field, and the bundle once more.
    for more in (b"\xa8\x3f\x01", StartRunRequest(fab=Fab(content=b"y")).SerializeToString()):
        with pytest.raises(DeploymentError):
            parse_start(whole + more)


@pytest.mark.parametrize("field", ["app_spec", "user_prompt", "federation"])
def test_a_start_that_asks_for_anything_else_is_refused(field: str) -> None:
    request = StartRunRequest(fab=Fab(content=b"x"))
    setattr(request, field, "something")
    with pytest.raises(DeploymentError, match="alone"):
        parse_start(request.SerializeToString())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-automation",
        "/v1/control/list-runs",
        "/v1/control/add-app",
        "/v1/control/create-federation",
        "/v1/control/start-run/",
        "/v1//control/start-run",
        "/v1/runtime/create-task",
        "/v1/runtime/acquire-task",
        "/v1/runtime/start-automation",
        "/v1/responses",
    ],
)
def test_calls_that_the_coordinator_does_not_need_are_not_there(
    federation: Running, path: str
) -> None:
    with client_of(federation) as client:
        response = client.post(path, content=ListRunsRequest().SerializeToString())
    assert response.status_code == 404


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/health", "/"])
def test_there_is_nothing_to_look_at(federation: Running, path: str) -> None:
    with client_of(federation) as client:
        assert client.get(path).status_code == 404


def test_a_run_is_not_claimed_without_the_executors_signature(federation: Running) -> None:
    with client_of(federation) as client:
        for path, request in {
            "pull-pending-tasks": PullPendingTasksRequest().SerializeToString(),
            "claim-task": ClaimTaskRequest(task_id=1).SerializeToString(),
        }.items():
            response = client.post(f"/v1/runtime/{path}", content=request)
            assert response.status_code in {401, 403}, response.text


def test_a_key_that_is_not_enrolled_opens_no_connection(federation: Running) -> None:
    access = FleetAccess(
        address=f"127.0.0.1:{federation.federation.ports.fleet}",
        ca=authority(federation).read_bytes(),
        key=ec.generate_private_key(ec.SECP256R1()),
    )
    connection = FleetConnection(access)
    try:
        with pytest.raises(DeploymentError):
            connection.activate()
        with pytest.raises(DeploymentError):
            connection.pull()
    finally:
        connection.close()


def test_the_fleet_port_speaks_tls_only(federation: Running) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{federation.federation.ports.fleet}")
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=2)
    channel.close()
