from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from cryptography import x509

from gateway.errors import GatewayConfigurationError
from gateway.frontends.serve import check_certificate
from tests.gateway.frontends.served import Certificate, Running, certify, running

#: Old versions of TLS are asked for on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate behind a link, as the key server's issues are kept."""
    directory = tmp_path_factory.mktemp("tls")
    certify(directory / "1")
    (directory / "current").symlink_to("1")
    return Certificate(
        certificate=directory / "current" / "server.pem", key=directory / "current" / "server.key"
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, shown: Certificate) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("serve"), certificate=shown) as started:
        yield started


def tls(one: Running, *, highest: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
    """A connection that trusts anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if highest is not None:
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = highest
        context.set_ciphers("ALL:@SECLEVEL=0")
    plain = socket.create_connection(("127.0.0.1", one.port), timeout=5)
    return context.wrap_socket(plain)


def serial(one: Running) -> int:
    with tls(one) as connection:
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).serial_number


def get(one: Running, path: str) -> bytes:
    with tls(one) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    return answer


def workers(one: Running) -> list[psutil.Process]:
    children = psutil.Process(one.process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def eventually(true: Callable[[], bool], within_s: float = 40) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.1)
    return False


def test_prefers_tls_1_3_and_speaks_1_2(one: Running) -> None:
    with tls(one) as connection:
        assert connection.version() == "TLSv1.3"
    with tls(one, highest=ssl.TLSVersion.TLSv1_2) as connection:
        assert connection.version() == "TLSv1.2"


def test_refuses_tls_1_1(one: Running) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        tls(one, highest=ssl.TLSVersion.TLSv1_1)


def test_a_new_certificate_is_shown_after_sighup_and_no_exchange_is_lost(
    one: Running, shown: Certificate
) -> None:
    current = shown.certificate.parent
    before = serial(one)
    shutil.copytree(current.parent / "1", current.parent / "2")
    fresh = certify(current.parent / "2")
    link = current.parent / "next"
    link.symlink_to("2")
    link.rename(current)
    wanted = x509.load_pem_x509_certificate(fresh.certificate.read_bytes()).serial_number
    assert wanted != before
    answers: list[bytes] = []
    ends = [threading.Thread(target=lambda: answers.append(get(one, "/slow"))) for _ in range(3)]
    for thread in ends:
        thread.start()
    one.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: serial(one) == wanted)
    for thread in ends:
        thread.join()
    assert all(answer.endswith(b"slow but whole") for answer in answers)
    assert len(answers) == 3


def test_a_certificate_that_cannot_be_used_does_not_stop_what_serves(
    one: Running, shown: Certificate
) -> None:
    good = shown.certificate.read_bytes()
    # A restart for an earlier certificate may still be going on.
    expected = x509.load_pem_x509_certificate(good).serial_number
    assert eventually(lambda: serial(one) == expected)
    shown.certificate.write_bytes(b"broken")
    try:
        one.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "gateway.restart_refused" in one.said())
        assert serial(one) == expected
    finally:
        shown.certificate.write_bytes(good)


def test_a_worker_that_dies_is_replaced(one: Running) -> None:
    assert eventually(lambda: len(workers(one)) == 1)
    # Two starts within seconds would be taken for one that cannot succeed.
    time.sleep(5.5)
    (worker,) = workers(one)
    worker.kill()

    def answers() -> bool:
        try:
            return get(one, "/").startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    assert eventually(answers), one.said()


def test_exchanges_in_progress_end_before_it_stops_and_new_ones_are_refused(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as stopping:
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(get(stopping, "/slow")))
        thread.start()
        assert eventually(lambda: "slow has begun" in stopping.said())
        stopping.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError, match=r"refused|reset|EOF"):
            get(stopping, "/")
        thread.join()
        assert answers[0].endswith(b"slow but whole")
        assert stopping.process.wait(timeout=10) == 0


def test_workers_end_when_their_parent_was_killed(tmp_path: Path) -> None:
    with running(tmp_path, workers=2) as killed:
        left = workers(killed)
        assert len(left) == 2
        os.kill(killed.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=10)
        for process in alive:
            process.kill()
        assert not alive


def test_exchanges_in_progress_end_although_the_parent_was_killed(tmp_path: Path) -> None:
    with running(tmp_path) as killed:
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(get(killed, "/slow")))
        thread.start()
        assert eventually(lambda: "slow has begun" in killed.said())
        os.kill(killed.process.pid, signal.SIGKILL)
        thread.join()
        assert answers[0].endswith(b"slow but whole")


def test_a_worker_whose_parent_was_killed_before_it_could_serve_ends_too(tmp_path: Path) -> None:
    with running(tmp_path, serving=False, HAVENGATE_TEST_APP="orphan") as killed:
        # In its start, after its signals were set up and before its loop runs for good.
        assert eventually(lambda: "orphan to be" in killed.said())
        (left,) = workers(killed)
        os.kill(killed.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs([left], timeout=10)
        for process in alive:
            process.kill()
        assert not alive


@pytest.mark.parametrize("wrong", ["missing", "another key", "no certificate"])
def test_a_certificate_that_cannot_be_used_stops_the_start(tmp_path: Path, wrong: str) -> None:
    files = certify(tmp_path)
    if wrong == "missing":
        files.key.unlink()
    elif wrong == "another key":
        files.key.write_bytes(certify(tmp_path / "other").key.read_bytes())
    else:
        files.certificate.write_text("nothing")
    with pytest.raises(GatewayConfigurationError, match="belong together"):
        check_certificate(files.certificate, files.key)
