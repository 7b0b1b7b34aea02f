"""Certificates from a real authority: issued, renewed, kept through failures, ended in time."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from keys.certificates import CertificateManager, IssuedCertificate
from keys.errors import CertificateError, VaultRejectedError, VaultUnavailableError
from keys.settings import PkiSettings
from keys.vault import VaultClient

HOUR_S = 3600.0
NAMES = ("localhost", IPv4Address("127.0.0.1"))


class Clock:
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(
    vault: Callable[[str], VaultClient], tmp_path: Path, clock: Clock
) -> CertificateManager:
    return new_manager(vault("gateway"), tmp_path / "tls", clock)


def new_manager(
    client: VaultClient, directory: Path, clock: Callable[[], float]
) -> CertificateManager:
    return CertificateManager(
        client, kind="server", names=NAMES, directory=directory, settings=PkiSettings(), clock=clock
    )


def break_server(monkeypatch: pytest.MonkeyPatch, client: VaultClient) -> None:
    def away(*_: object, **__: object) -> None:
        raise VaultUnavailableError("away")

    monkeypatch.setattr(client, "call", away)


def handshake(issued: IssuedCertificate, name: str) -> None:
    """One TLS connection in which the client verifies the server."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(issued.certificate_file, issued.key_file)
    client = ssl.create_default_context(cafile=str(issued.ca_file))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            plain, _ = listening.accept()
            with server.wrap_socket(plain, server_side=True) as secured:
                secured.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            socket.create_connection(listening.getsockname()) as plain,
            client.wrap_socket(plain, server_hostname=name) as secured,
        ):
            secured.send(b".")
        thread.join()


def test_what_is_issued_serves_its_names(manager: CertificateManager) -> None:
    assert manager.renew_if_due()
    issued = manager.current()
    handshake(issued, "localhost")
    handshake(issued, "127.0.0.1")
    certificate = x509.load_pem_x509_certificate(issued.certificate_file.read_bytes())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    key = load_pem_private_key(issued.key_file.read_bytes(), None)
    assert key.public_key() == certificate.public_key()
    assert issued.not_after - time.time() < 24 * HOUR_S + 60


def test_a_node_can_only_be_a_client_and_so_cannot_pass_for_a_server(
    vault: Callable[[str], VaultClient], tmp_path: Path, clock: Clock
) -> None:
    manager = CertificateManager(
        vault("node"),
        kind="node",
        names=["node-1.havengate.internal"],
        directory=tmp_path / "tls",
        settings=PkiSettings(),
        clock=clock,
    )
    manager.renew_if_due()
    pem = manager.current().certificate_file.read_bytes()
    usage = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
        x509.ExtendedKeyUsage
    )
    assert list(usage.value) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_the_private_key_is_never_sent(
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = vault("gateway")
    sent: list[str] = []
    call = client.call

    def noting(method: str, path: str, body: dict[str, str]) -> dict[str, object]:
        sent.append(f"{path} {body}")
        return call(method, path, body)

    monkeypatch.setattr(client, "call", noting)
    new_manager(client, tmp_path / "tls", clock).renew_if_due()
    assert len(sent) == 1
    assert "CERTIFICATE REQUEST" in sent[0]
    assert "PRIVATE KEY" not in sent[0]


def test_renews_by_the_fraction_of_life_that_is_left(
    manager: CertificateManager, clock: Clock
) -> None:
    manager.renew_if_due()
    first = manager.current()
    clock.ahead_s = 15 * HOUR_S
    assert not manager.renew_if_due()
    assert manager.current() == first
    clock.ahead_s = 17 * HOUR_S
    assert manager.renew_if_due()
    assert manager.current().certificate_file != first.certificate_file
    # A program that still reads the former issue finds it whole.
    handshake(first, "localhost")


def test_keeps_the_old_one_through_failures_and_fails_closed_at_its_end(
    manager: CertificateManager,
    clock: Clock,
    vault: Callable[[str], VaultClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager.renew_if_due()
    first = manager.current()
    with monkeypatch.context() as patch:
        break_server(patch, vault("gateway"))
        clock.ahead_s = 23 * HOUR_S
        assert not manager.renew_if_due()
        assert manager.current() == first
        clock.ahead_s = 25 * HOUR_S
        with pytest.raises(CertificateError, match="expired"):
            manager.current()
        with pytest.raises(CertificateError) as raised:
            manager.renew_if_due()
        assert isinstance(raised.value.__cause__, VaultUnavailableError)
    clock.ahead_s = 23 * HOUR_S
    assert manager.renew_if_due()
    assert manager.current() != first


def test_there_is_none_before_the_first_issue(manager: CertificateManager) -> None:
    with pytest.raises(CertificateError, match="No certificate"):
        manager.current()


def test_another_process_finds_what_was_issued(
    manager: CertificateManager,
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    clock: Clock,
) -> None:
    manager.renew_if_due()
    other = new_manager(vault("gateway"), tmp_path / "tls", clock)
    assert not other.renew_if_due()
    assert other.current() == manager.current()


def test_a_renewal_by_another_process_is_taken_over(
    manager: CertificateManager, vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    manager.renew_if_due()
    first = manager.current()
    now = first.not_before
    other = new_manager(vault("gateway"), tmp_path / "tls", lambda: now)
    assert other.current() == first
    # Certificates count whole seconds: only so is the second one due later than the first.
    time.sleep(1.1)
    manager._current = None
    (tmp_path / "tls" / "current").unlink()
    manager.renew_if_due()
    second = manager.current()
    # The first is due at this moment, and the second will be a little later.
    left = PkiSettings().renew_fraction
    now = first.not_after - left * (first.not_after - first.not_before) + 0.1
    assert other.renew_if_due()
    assert other.current() == second != first


def test_other_names_need_another_certificate(
    manager: CertificateManager,
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    clock: Clock,
) -> None:
    manager.renew_if_due()
    other = CertificateManager(
        vault("gateway"),
        kind="server",
        names=["gateway.havengate.internal"],
        directory=tmp_path / "tls",
        settings=PkiSettings(),
        clock=clock,
    )
    assert other.renew_if_due()


@pytest.mark.parametrize("name", ["example.com", "havengate.internal.example.com", "*.localhost"])
def test_a_name_outside_the_allowed_domains_is_refused(
    vault: Callable[[str], VaultClient], tmp_path: Path, clock: Clock, name: str
) -> None:
    manager = CertificateManager(
        vault("node"),
        kind="node",
        names=[name],
        directory=tmp_path / "tls",
        settings=PkiSettings(),
        clock=clock,
    )
    with pytest.raises(CertificateError) as raised:
        manager.renew_if_due()
    assert isinstance(raised.value.__cause__, VaultRejectedError)


def test_files_are_closed_to_others_and_old_issues_go(
    manager: CertificateManager, tmp_path: Path, clock: Clock
) -> None:
    for _ in range(4):
        manager._current = None
        (tmp_path / "tls" / "current").unlink(missing_ok=True)
        assert manager.renew_if_due()
    issues = [path for path in (tmp_path / "tls").iterdir() if path.name != "current"]
    assert len(issues) == 2
    for path in (tmp_path / "tls").rglob("*"):
        assert path.is_symlink() or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_crash_while_storing_never_pairs_a_key_with_another_certificate(
    manager: CertificateManager,
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
) -> None:
    manager.renew_if_due()
    first = manager.current()
    clock.ahead_s = 17 * HOUR_S
    replace = Path.replace
    seen = 0

    def cut(path: Path, target: Path) -> Path:
        nonlocal seen
        seen += 1
        if seen == write:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            manager.renew_if_due()
    found = new_manager(vault("gateway"), tmp_path / "tls", clock).current()
    assert found == first
    handshake(found, "localhost")


def test_a_certificate_for_another_key_is_not_accepted(
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = vault("gateway")
    kept: list[dict[str, object]] = []
    call = client.call

    def replayed(method: str, path: str, body: dict[str, str]) -> dict[str, object]:
        kept.append(call(method, path, body))
        return kept[0]

    monkeypatch.setattr(client, "call", replayed)
    manager = new_manager(client, tmp_path / "tls", clock)
    assert manager.renew_if_due()
    clock.ahead_s = 17 * HOUR_S
    assert not manager.renew_if_due()
    clock.ahead_s = 25 * HOUR_S
    with pytest.raises(CertificateError) as raised:
        manager.renew_if_due()
    assert isinstance(raised.value.__cause__, VaultRejectedError)
