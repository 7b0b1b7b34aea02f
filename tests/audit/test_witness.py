"""The witness: what it answers, and that it never signs two stories."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from audit.checkpoint import (
    Checkpoint,
    SignedCheckpoint,
    parse_checkpoint,
    sign_checkpoint,
)
from audit.errors import AuditConfigurationError, MalformedNoteError, WitnessError
from audit.log import LogWriter
from audit.merkle import EMPTY_ROOT, leaf_hash, node_hash
from audit.note import VerifierKey, parse_signature_lines
from audit.publish import Publisher
from audit.verify import verify_log
from audit.witness import (
    LocalSigner,
    Request,
    Witness,
    WitnessClient,
    WitnessServer,
    parse_request,
)
from tests.audit.conftest import ORIGIN, Log, MemorySigner, entry
from tests.audit.local_witness import local_witness

A, B, C = (leaf_hash(b"a"), leaf_hash(b"b"), leaf_hash(b"c"))


def at(signer: MemorySigner, size: int, root: bytes, origin: str = ORIGIN) -> bytes:
    return sign_checkpoint(Checkpoint(origin=origin, size=size, root=root), signer).note.encode()


def ask(witness: Witness, old: int, proof: list[bytes], checkpoint: bytes) -> tuple[int, str, str]:
    request = Request(old_size=old, proof=tuple(proof), checkpoint=checkpoint)
    answer = witness.add_checkpoint(request.encode())
    return answer.status, answer.body.decode(), answer.content_type


@pytest.fixture
def witness(log: Log, tmp_path: Path) -> Witness:
    return local_witness(tmp_path / "witness", log.keys)


def test_answers_exactly_as_the_specification_says(log: Log, witness: Witness) -> None:
    one, two, three = A, node_hash(A, B), node_hash(node_hash(A, B), C)
    signer = log.signer
    assert ask(witness, 0, [], at(signer, 1, one))[0] == 200
    assert ask(witness, 0, [], at(signer, 1, one, "unknown.example/log"))[0] == 404
    assert ask(witness, 1, [B], at(MemorySigner(), 2, two))[0] == 403
    assert ask(witness, 3, [], at(signer, 2, two))[0] == 400
    assert witness.add_checkpoint(b"nonsense").status == 400
    conflict = (409, "1\n", "text/x.tlog.size")
    assert ask(witness, 0, [], at(signer, 2, two)) == conflict
    assert ask(witness, 2, [C], at(signer, 3, three)) == conflict
    assert ask(witness, 1, [], at(signer, 1, two)) == conflict
    assert ask(witness, 1, [C], at(signer, 2, two))[0] == 422
    assert ask(witness, 1, [], at(signer, 2, two))[0] == 422
    assert ask(witness, 1, [B], at(signer, 2, two))[0] == 200
    status, body, _ = ask(witness, 2, [C], at(signer, 3, three))
    assert status == 200
    (line,) = parse_signature_lines(body)
    witness.verifier_keys()[0].verify(
        Checkpoint(origin=ORIGIN, size=3, root=three).text, line.signature
    )
    # The same again: it may have signed and its answer got lost.
    assert ask(witness, 3, [], at(signer, 3, three))[0] == 200


def test_knows_the_empty_tree(log: Log, witness: Witness) -> None:
    assert ask(witness, 0, [], at(log.signer, 0, EMPTY_ROOT))[0] == 200
    assert ask(witness, 0, [A], at(log.signer, 1, A))[0] == 422
    assert ask(witness, 0, [], at(log.signer, 1, A))[0] == 200


def test_never_signs_two_stories_also_after_a_restart_or_at_once(log: Log, tmp_path: Path) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)
    roots = [leaf_hash(b"%d" % n) for n in range(32)]
    with ThreadPoolExecutor(16) as pool:
        statuses = list(
            pool.map(lambda root: ask(witness, 0, [], at(log.signer, 1, root))[0], roots)
        )
    assert sorted(statuses) == [200] + [409] * 31
    again = local_witness(tmp_path / "witness", log.keys)
    statuses = [ask(again, size, [], at(log.signer, 1, r))[0] for r in roots for size in (0, 1)]
    assert statuses.count(200) == 1


def test_remembers_durably_before_it_signs(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)
    order: list[str] = []
    real = Witness._cosign
    monkeypatch.setattr("audit.files.sync_data", lambda _: order.append("data"))
    monkeypatch.setattr("audit.files.sync_directory", lambda _: order.append("name"))

    def cosign(self: Witness, checkpoint: Checkpoint) -> object:
        order.append("sign")
        return real(self, checkpoint)

    monkeypatch.setattr(Witness, "_cosign", cosign)
    assert ask(witness, 0, [], at(log.signer, 1, A))[0] == 200
    assert order == ["data", "name", "sign"]


def test_a_witness_that_cannot_remember_does_not_sign(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("audit.witness.replace_file_durably", full)
    with pytest.raises(OSError, match="No space"):
        ask(witness, 0, [], at(log.signer, 1, A))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"old 0\n",
        b"old\n\n",
        b"old -1\n\nx",
        b"old 00\n\nx",
        b"new 0\n\nx",
        b"old 0\nnot base64!\n\nx",
        b"old 0\nAAAA\n\nx",
        b"old 0\n" + b"A" * 43 + b"=\n" * 1 + (b"A" * 43 + b"=\n") * 63 + b"\nx",
        b"\xff\n\nx",
    ],
)
def test_refuses_a_request_that_is_none(body: bytes, witness: Witness) -> None:
    with pytest.raises(MalformedNoteError):
        parse_request(body)
    assert witness.add_checkpoint(body).status == 400


@pytest.fixture
def server(witness: Witness) -> Iterator[WitnessServer]:
    with WitnessServer(("127.0.0.1", 0), witness) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def client_of(server: WitnessServer, key: VerifierKey | None = None) -> WitnessClient:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return WitnessClient(url, key=key or server.witness.verifier_keys()[0])


def test_a_log_is_cosigned_over_http_as_it_grows(log: Log, server: WitnessServer) -> None:
    with LogWriter.open(log.directory, origin=ORIGIN) as writer:
        for round_number in range(4):
            # A new client knows nothing of what the witness has seen, and proves again.
            with Publisher(writer, log.signer, witnesses=[client_of(server)]) as publisher:
                for number in range(150):
                    writer.append(entry(1000 * round_number + number))
                publisher.publish()
                assert publisher.status().witness_errors == {}
            report = verify_log(
                log.directory, log.keys, witness_keys=server.witness.verifier_keys()
            )
            assert report.cosigned_by == ("witness.example",)


def test_a_log_that_was_rolled_back_gets_no_cosignature(
    log: Log, server: WitnessServer, tmp_path: Path
) -> None:
    client = client_of(server)
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer, witnesses=[client]) as publisher,
    ):
        for number in range(10):
            writer.append(entry(number))
        publisher.publish()
    forged = Log(tmp_path / "forged", signer=log.signer)
    with (
        LogWriter.open(forged.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer, witnesses=[client_of(server)]) as publisher,
    ):
        for number in range(5):
            writer.append(entry(number))
        publisher.publish()
        assert "rolled back" in publisher.status().witness_errors["witness.example"]
        # The same number of other entries, and more of them.
        for number in range(5, 20):
            writer.append(entry(900 + number))
            publisher.publish()
            assert "witness.example" in publisher.status().witness_errors
        assert "422" in publisher.status().witness_errors["witness.example"]


def signed_by(log: Log) -> SignedCheckpoint:
    log.fill(1)
    return parse_checkpoint(log.checkpoint)


def test_a_cosignature_by_another_key_is_refused(log: Log, server: WitnessServer) -> None:
    stranger = VerifierKey.cosigner("witness.example", MemorySigner().public_keys()[1])
    with pytest.raises(WitnessError, match="another key"):
        client_of(server, stranger).cosign(signed_by(log), lambda _: [])


def test_a_witness_out_of_reach_is_an_error_that_says_so(log: Log) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        key = VerifierKey.cosigner("w", MemorySigner().public_keys()[1])
        slow = WitnessClient(f"http://127.0.0.1:{port}", key=key, timeout_s=0.2)
        with pytest.raises(WitnessError, match="out of reach"):
            slow.cosign(signed_by(log), lambda _: [])
    with pytest.raises(WitnessError, match="out of reach"):
        slow.cosign(parse_checkpoint(log.checkpoint), lambda _: [])
    with pytest.raises(AuditConfigurationError, match="http"):
        WitnessClient("ftp://w.example", key=key)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /add-checkpoint HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        ("POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413),
        ("POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 404),
        ("POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 501),
        ("POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
    ],
)
def test_the_server_refuses_what_it_does_not_serve(
    server: WitnessServer, head: str, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", int(server.server_address[1])), 5) as connection:
        connection.sendall(head.encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        response.close()


def test_a_request_that_drags_on_is_cut_off(
    server: WitnessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.witness.REQUEST_S", 0.2)
    with socket.create_connection(("127.0.0.1", int(server.server_address[1])), 10) as connection:
        connection.sendall(
            b"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
        )
        assert b"200" not in connection.recv(1000)


def test_more_connections_than_slots_are_closed(
    server: WitnessServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server._slots = threading.BoundedSemaphore(1)
    address = ("127.0.0.1", int(server.server_address[1]))
    with socket.create_connection(address, 5) as first:
        first.sendall(b"POST /add")
        with socket.create_connection(address, 5) as second:
            assert second.recv(10) == b""
        first.sendall(b"-checkpoint HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        assert b"400" in first.recv(1000)


def test_the_local_key_is_kept_in_a_file_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "witness"
    made = LocalSigner.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert LocalSigner.load_or_create(path).public_keys() == made.public_keys()
    path.chmod(0o640)
    with pytest.raises(AuditConfigurationError, match="chmod"):
        LocalSigner.load_or_create(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(AuditConfigurationError, match="32 bytes"):
        LocalSigner.load_or_create(path)
