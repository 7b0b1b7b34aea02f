"""A key server that answers, but not as it should: slowly, endlessly, cut short, or with nonsense.

The real server cannot be made to do this; a small one on loopback plays the answers.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from keys.errors import KeyConfigurationError, VaultError, VaultRejectedError, VaultUnavailableError
from keys.kv import KVStore
from keys.ports import WrappedKey, WrapRequest
from keys.settings import VaultSettings
from keys.signing import VaultSigner
from keys.transit import TransitKeyWrapper, VaultHMAC
from keys.vault import FixedToken, VaultClient

#: What a call may take beyond its deadline on a busy machine.
SLACK_S = 3.0
WRAPPED = WrappedKey(context=b"clinic/person", text="vault:v1:AAAA", epoch=1)

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def server_that(answer: Answer) -> Iterator[VaultClient]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with suppress(OSError):
                answer(self)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        settings = VaultSettings(
            address=f"http://127.0.0.1:{server.server_port}",
            timeout_s=0.5,
            deadline_s=1.0,
            attempts=2,
        )
        try:
            with VaultClient(
                settings=settings, role="gateway", credentials=FixedToken(token="t")
            ) as client:
                yield client
        finally:
            server.shutdown()
            thread.join()


def saying(body: bytes, *, status: int = 200, length: int | None = None) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def saying_json(value: object, *, status: int = 200) -> Answer:
    return saying(json.dumps(value).encode(), status=status)


# --- Time and memory ------------------------------------------------------------------------------


def test_an_answer_that_drips_ends_with_the_deadline() -> None:
    stop = threading.Event()

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        ends = time.monotonic() + 30
        while time.monotonic() < ends and not stop.wait(0.05):
            handler.wfile.write(b" ")

    with server_that(drip) as client:
        began = time.monotonic()
        with pytest.raises(VaultUnavailableError):
            client.call("GET", "anything")
        lasted_s = time.monotonic() - began
        stop.set()
    assert lasted_s < 1.0 + SLACK_S


def test_an_answer_without_an_end_is_not_read_into_memory() -> None:
    sent = 0

    def pour(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        block = b" " * 65536
        while sent < 512 * 1024 * 1024:
            handler.wfile.write(block)
            sent += len(block)

    with server_that(pour) as client, pytest.raises(VaultUnavailableError, match="larger than"):
        client.call("POST", "anything", {}, idempotent=False)
    assert sent < 64 * 1024 * 1024


def test_an_answer_that_was_cut_short_is_no_answer() -> None:
    with server_that(saying(b"", length=12)) as client, pytest.raises(VaultUnavailableError):
        client.call("POST", "transit/trim", {})


def test_an_empty_answer_that_does_not_say_so_is_no_success() -> None:
    with server_that(saying(b"")) as client, pytest.raises(VaultUnavailableError):
        client.call("POST", "transit/trim", {})


# --- Absence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        saying(b"<html>no such page</html>", status=404),
        saying(b"", status=404),
        saying_json({"errors": ["no handler for route 'havengate/kv/data/x'"]}, status=404),
        saying_json({"message": "not found"}, status=404),
    ],
)
def test_a_secret_is_absent_only_if_the_key_server_says_so(answer: Answer) -> None:
    with server_that(answer) as client, pytest.raises(VaultError):
        KVStore(client, "gateway").read("otp/person-1")


def test_a_secret_that_is_not_there_is_absent() -> None:
    with server_that(saying_json({"errors": []}, status=404)) as client:
        assert KVStore(client, "gateway").read("otp/person-1") is None


# --- Nonsense -------------------------------------------------------------------------------------

NONSENSE: list[Any] = [
    {},
    {"data": None},
    {"data": []},
    {"data": ["x"]},
    {"data": {}},
    {"data": {"batch_results": [None]}},
    {"data": {"batch_results": ["x"]}},
    {"data": {"batch_results": [{"plaintext": 7, "ciphertext": 7, "hmac": 7}]}},
    {"data": {"batch_results": [{"plaintext": "é", "ciphertext": "é", "hmac": "é"}]}},
    {"data": {"batch_results": [{"hmac": "vault:v1:AAAA"}]}},
    {"data": {"type": "ed25519"}},
    {"data": {"type": "ed25519", "keys": ["x"]}},
    {"data": {"type": "ed25519", "keys": {"x": {}}}},
    {"data": {"type": "ed25519", "keys": {"1": "x"}}},
    {"data": {"type": "ed25519", "keys": {"1": {"public_key": None}}}},
    {"data": {"type": "ed25519", "keys": {"1": {"public_key": "é"}}}},
    {"data": {"signature": 7}},
    {"data": {"signature": ["vault", "v1"]}},
    {"data": {"latest_version": True, "min_decryption_version": 1, "min_available_version": 0}},
    {"data": {"latest_version": 0, "min_decryption_version": 1, "min_available_version": 0}},
]

CALLS: dict[str, Callable[[VaultClient], object]] = {
    "wrap": lambda client: TransitKeyWrapper(client).wrap(
        [WrapRequest(context=b"c", key=bytes(32))]
    ),
    "unwrap": lambda client: TransitKeyWrapper(client).unwrap([WRAPPED]),
    "rewrap": lambda client: TransitKeyWrapper(client).rewrap([WRAPPED]),
    "epochs": lambda client: TransitKeyWrapper(client).epochs(),
    "roll": lambda client: TransitKeyWrapper(client).roll(),
    "trim": lambda client: TransitKeyWrapper(client).trim(1),
    "hmac": lambda client: VaultHMAC(client).compute([b"m"]),
    "public keys": lambda client: VaultSigner(client, "audit-log").public_keys(),
    "sign": lambda client: VaultSigner(client, "audit-log").sign(b"m"),
}


@pytest.mark.parametrize("call", CALLS)
def test_nonsense_is_a_typed_error(call: str) -> None:
    said: list[object] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        saying_json(said[-1])(handler)

    with server_that(answer) as client:
        for nonsense in NONSENSE:
            said.append(nonsense)
            with pytest.raises(VaultError):
                CALLS[call](client)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"9" * 10_000, b'"x"', b"\xff\xfe", b"null"])
def test_bytes_that_are_not_an_object_are_a_typed_error(body: bytes) -> None:
    with server_that(saying(body)) as client, pytest.raises(VaultUnavailableError):
        client.call("GET", "anything")


@pytest.mark.parametrize(
    "auth",
    [
        [],
        "x",
        {"client_token": "t", "lease_duration": True},
        {"client_token": "t", "lease_duration": -1},
        {"client_token": "t", "lease_duration": 0},
        {"client_token": "s.\n", "lease_duration": 60},
        {"client_token": "", "lease_duration": 60},
    ],
)
def test_a_login_without_a_token_that_can_be_used_is_refused(auth: object) -> None:
    with server_that(saying_json({"auth": auth})) as client, pytest.raises(VaultRejectedError):
        client._ask_for_token("auth/havengate/login", {}, None, client._caller.deadline())


# --- Effects that did not happen ------------------------------------------------------------------


def test_a_roll_that_did_not_happen_is_not_reported_as_one() -> None:
    state = {"latest_version": 3, "min_decryption_version": 1, "min_available_version": 0}
    with (
        server_that(saying_json({"data": state})) as client,
        pytest.raises(VaultRejectedError, match="did not begin"),
    ):
        TransitKeyWrapper(client).roll()


def test_a_trim_that_did_not_happen_is_not_reported_as_one() -> None:
    state = {
        "latest_version": 3,
        "min_decryption_version": 1,
        "min_encryption_version": 1,
        "min_available_version": 0,
    }
    with (
        server_that(saying_json({"data": state})) as client,
        pytest.raises(VaultRejectedError, match="did not destroy"),
    ):
        TransitKeyWrapper(client).trim(2)


# --- What is handed in ----------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["hvs.secret\n", "hvs.sécret", " hvs.secret", "hvs.\x00secret"])
def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(KeyConfigurationError) as raised:
        FixedToken(token=token)
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize("address", ["https://:hunter2@vault", "https://[::1", "https://vault:x"])
def test_an_address_that_cannot_be_used_is_refused_without_being_shown(address: str) -> None:
    with pytest.raises(KeyConfigurationError) as raised:
        VaultClient(
            settings=VaultSettings(address=address),
            role="gateway",
            credentials=FixedToken(token="t"),
        )
    assert "hunter2" not in str(raised.value)
