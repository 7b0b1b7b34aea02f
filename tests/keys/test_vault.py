"""The client against a real server that is killed, sealed, frozen, throttled, or refuses."""

from __future__ import annotations

import http.server
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from keys.errors import (
    KeyConfigurationError,
    KeysError,
    VaultDeniedError,
    VaultRejectedError,
    VaultSealedError,
    VaultThrottledError,
    VaultUnavailableError,
)
from keys.kv import KVStore, check_path
from keys.ports import WrappedKey, WrapRequest
from keys.server import server_status
from keys.settings import RoleSettings, VaultSettings
from keys.transit import TransitKeyWrapper
from keys.vault import FixedToken, VaultClient
from tests.openbao import RunningServer, running_server, wait_until

REQUEST = WrapRequest(context=b"clinic/person", key=bytes(range(32)))
#: What a call may take beyond its deadline on a busy machine.
SLACK_S = 3.0


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server that one test may break."""
    with running_server(
        tmp_path,
        vault=VaultSettings(timeout_s=0.5, deadline_s=2.0, breaker_open_s=0.2),
    ) as server:
        yield server


def other_settings(openbao: RunningServer, **changes: object) -> VaultSettings:
    embedded = openbao.embedded
    return msgspec.structs.replace(
        openbao.settings.vault,
        address=embedded.address,
        **{"ca_file": str(embedded.ca_file), **changes},
    )


def revoke(server: RunningServer, client: VaultClient) -> None:
    token = client._token
    assert token is not None
    with server.embedded.administer() as admin:
        admin.call("POST", "auth/token/revoke", {"token": token.value})


# --- The server is away
# ----------------------------------------------------------------------------


def test_recovers_by_itself_when_the_server_is_killed_under_load(own_server: RunningServer) -> None:
    with own_server.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        stop = threading.Event()
        wrong: list[BaseException] = []
        lasted: list[float] = []
        good = [0] * 8

        def load(number: int) -> None:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    wrapped = wrapper.wrap([REQUEST])
                    assert wrapper.unwrap(wrapped) == [REQUEST.key]
                    good[number] += 1
                except VaultUnavailableError:
                    pass
                except BaseException as error:
                    wrong.append(error)
                    raise
                finally:
                    lasted.append(time.monotonic() - began)

        threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                wait_until(lambda: all(good))
                own_server.kill()
                own_server.wait_until_up()
                good[:] = [0] * 8
            wait_until(lambda: all(good))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        assert max(lasted) < 2 * 2.0 + SLACK_S


def test_fails_typed_and_fast_while_the_server_is_stopped(own_server: RunningServer) -> None:
    with own_server.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapped = wrapper.wrap([REQUEST])
        with own_server.stopped():
            for _ in range(3):
                began = time.monotonic()
                with pytest.raises(VaultUnavailableError):
                    wrapper.wrap([REQUEST])
                with pytest.raises(VaultUnavailableError):
                    wrapper.unwrap(wrapped)
                assert time.monotonic() - began < 2 * 2.0 + SLACK_S
            assert server_status(client).circuit == "open"
        wait_until(lambda: _succeeds(lambda: wrapper.unwrap(wrapped)))
        assert wrapper.unwrap(wrapped) == [REQUEST.key]
        assert client.circuit == "closed"


def test_a_frozen_server_ends_in_a_time_out_within_the_deadline(own_server: RunningServer) -> None:
    with own_server.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapped = wrapper.wrap([REQUEST])
        with own_server.frozen():
            began = time.monotonic()
            with pytest.raises(VaultUnavailableError, match="no answer within"):
                wrapper.unwrap(wrapped)
            assert time.monotonic() - began < 2.0 + SLACK_S
        wait_until(lambda: _succeeds(lambda: wrapper.unwrap(wrapped)))


def test_a_frozen_server_does_not_hold_logins_of_many_threads_in_a_queue(
    own_server: RunningServer,
) -> None:
    with own_server.client("gateway") as client, own_server.frozen():
        outcomes: list[float] = []

        def call() -> None:
            began = time.monotonic()
            with pytest.raises(VaultUnavailableError):
                client.token_ttl_s()
            outcomes.append(time.monotonic() - began)

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 8
        assert max(outcomes) < 2.0 + SLACK_S


def test_a_sealed_server_is_named_and_recovers_when_unsealed(own_server: RunningServer) -> None:
    with own_server.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapped = wrapper.wrap([REQUEST])
        own_server.seal()
        with pytest.raises(VaultSealedError):
            wrapper.unwrap(wrapped)
        status = server_status(client)
        assert (status.reachable, status.sealed) == (True, True)
        own_server.kill()
        own_server.wait_until_up()
        wait_until(lambda: _succeeds(lambda: wrapper.unwrap(wrapped)))


def test_a_roll_is_sent_once_when_no_answer_comes(own_server: RunningServer) -> None:
    with own_server.client("operator") as client:
        wrapper = TransitKeyWrapper(client)
        assert wrapper.epochs() == (1, 1)
        with own_server.frozen(), pytest.raises(VaultUnavailableError):
            wrapper.roll()
        wait_until(lambda: _succeeds(wrapper.epochs))
        # The one request may have been read by the server once it went on.
        time.sleep(0.5)
        assert wrapper.epochs()[1] <= 2


def test_a_full_audit_disk_of_the_server_is_an_error_and_ends_with_it(
    own_server: RunningServer,
) -> None:
    audit_file = own_server.embedded.audit_file
    with own_server.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapped = wrapper.wrap([REQUEST])
        kept = audit_file.with_suffix(".kept")
        audit_file.rename(kept)
        audit_file.symlink_to("/dev/full")
        own_server.reload()
        wait_until(lambda: not _succeeds(lambda: wrapper.unwrap(wrapped)))
        with pytest.raises(VaultUnavailableError):
            wrapper.unwrap(wrapped)
        audit_file.unlink()
        kept.rename(audit_file)
        own_server.reload()
        wait_until(lambda: _succeeds(lambda: wrapper.unwrap(wrapped)))


# --- The server refuses
# ----------------------------------------------------------------------------


def test_logs_in_again_when_its_token_is_revoked_under_load(openbao: RunningServer) -> None:
    with openbao.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapper.wrap([REQUEST])
        stop = threading.Event()
        errors: list[KeysError] = []

        def load() -> None:
            while not stop.is_set():
                try:
                    wrapper.wrap([REQUEST])
                except KeysError as error:
                    errors.append(error)

        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        logins_before = client._token.generation if client._token else 0
        try:
            for _ in range(3):
                revoke(openbao, client)
                time.sleep(0.2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not errors
        assert client._token is not None
        # One login for each revocation, not one for each thread.
        assert client._token.generation - logins_before <= 3


def test_a_denied_call_costs_no_new_token(openbao: RunningServer) -> None:
    with openbao.client("audit") as client:
        for _ in range(3):
            with pytest.raises(VaultDeniedError):
                TransitKeyWrapper(client).wrap([REQUEST])
        assert client._token is not None
        assert client._token.generation == 1


def test_a_revoked_secret_is_named(openbao: RunningServer, tmp_path: Path) -> None:
    role_id = Path(openbao.embedded.credentials("gateway").role_id_file).read_bytes()
    files = credentials(tmp_path, role_id=role_id)
    settings = other_settings(openbao)
    with (
        VaultClient(settings=settings, role="gateway", credentials=files) as client,
        pytest.raises(VaultDeniedError, match="refused the login"),
    ):
        client.call("GET", "auth/token/lookup-self")


def test_a_quota_ends_in_throttled_and_is_waited_out(openbao: RunningServer) -> None:
    path = "sys/quotas/rate-limit/test"
    mount = f"{openbao.settings.vault.prefix}/transit"
    with openbao.embedded.administer() as admin, openbao.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapper.wrap([REQUEST])
        admin.call("POST", "sys/quotas/config", {"enable_rate_limit_response_headers": True})
        admin.call("POST", path, {"path": mount, "rate": 1, "interval": "1s"})
        try:
            # The pause that the server asks for is kept, so calls succeed, only slower.
            began = time.monotonic()
            for _ in range(3):
                wrapper.wrap([REQUEST])
            assert time.monotonic() - began > 1.0
            admin.call("POST", path, {"path": mount, "rate": 1, "interval": "600s"})
            wrapper.wrap([REQUEST])
            began = time.monotonic()
            with pytest.raises(VaultThrottledError):
                wrapper.wrap([REQUEST])
            # Ten minutes is more time than the call has: it does not even begin to wait.
            assert time.monotonic() - began < SLACK_S
        finally:
            admin.call("DELETE", path)
        assert client.circuit == "closed"
        wrapper.wrap([REQUEST])


def test_what_does_not_exist_is_rejected_once(vault: Callable[[str], VaultClient]) -> None:
    client = vault("gateway")
    with pytest.raises(VaultRejectedError):
        client.call("GET", f"{client.layout.kv}/data/gateway/nothing-here")
    with pytest.raises(VaultRejectedError):
        client.call("POST", f"{client.layout.transit}/decrypt/kek", {"ciphertext": "nonsense"})


# --- Tokens
# ----------------------------------------------------------------------------------------


class Shifted:
    """The machine's monotonic clock, moved by the test."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def shifted_client(openbao: RunningServer, clock: Shifted) -> VaultClient:
    return VaultClient(
        settings=other_settings(openbao),
        role="gateway",
        credentials=openbao.embedded.credentials("gateway"),
        clock=clock,
    )


def test_a_token_is_renewed_before_it_expires(openbao: RunningServer) -> None:
    clock = Shifted()
    with shifted_client(openbao, clock) as client:
        life_s = client.token_ttl_s()
        first = client._token
        clock.ahead_s += 0.7 * life_s
        assert client.token_ttl_s() > 0.9 * life_s
        assert client._token is not None
        assert first is not None
        assert client._token.value == first.value


def test_an_expired_token_is_replaced_by_a_login(openbao: RunningServer) -> None:
    clock = Shifted()
    with shifted_client(openbao, clock) as client:
        life_s = client.token_ttl_s()
        first = client._token
        clock.ahead_s += 2 * life_s
        client.call("GET", "auth/token/lookup-self")
        assert client._token is not None
        assert first is not None
        assert client._token.value != first.value


def test_a_token_that_cannot_be_renewed_just_now_is_still_used(own_server: RunningServer) -> None:
    clock = Shifted()
    with shifted_client(own_server, clock) as client:
        life_s = client.token_ttl_s()
        with own_server.stopped():
            clock.ahead_s += 0.7 * life_s
            assert 0 < client.token_ttl_s() < 0.31 * life_s
        clock.ahead_s += 2
        wait_until(lambda: client.token_ttl_s() > 0.9 * life_s)


def test_many_threads_share_one_first_login(openbao: RunningServer) -> None:
    with openbao.client("gateway") as client:
        barrier = threading.Barrier(12)

        def call() -> None:
            barrier.wait()
            client.token_ttl_s()

        threads = [threading.Thread(target=call) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client._token is not None
        assert client._token.generation == 1


# --- Nothing leaks
# -----------------------------------------------------------------------------------


def test_tokens_and_secrets_appear_in_no_log_error_or_repr(
    openbao: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    with openbao.client("gateway") as client:
        wrapper = TransitKeyWrapper(client)
        wrapped = wrapper.wrap([REQUEST])
        texts.append(repr(client) + repr(client._credentials) + repr(client._token))
        assert client._token is not None
        secrets = [client._token.value]
        files = openbao.embedded.credentials("gateway")
        secrets += [Path(files.role_id_file).read_text(), Path(files.secret_id_file).read_text()]
        secrets.append(wrapped[0].text)
        moved = WrappedKey(context=b"someone else", text=wrapped[0].text, epoch=1)
        for bad in (lambda: wrapper.unwrap([moved]), wrapper.roll):
            try:
                bad()
            except KeysError as error:
                texts.append("".join(traceback.format_exception(error)) + str(error.diagnostics()))
    texts.append(caplog.text)
    for secret in secrets:
        assert all(secret not in text for text in texts)


def test_a_token_does_not_follow_a_redirect(openbao: RunningServer) -> None:
    seen: list[str] = []
    with _http_server(seen) as target, _http_server(seen, redirect_to=target) as address:
        settings = msgspec.structs.replace(openbao.settings.vault, address=address, attempts=1)
        with (
            VaultClient(
                settings=settings, role="gateway", credentials=FixedToken(token="secret-token")
            ) as client,
            pytest.raises(VaultUnavailableError, match="redirect"),
        ):
            client.call("GET", "auth/token/lookup-self")
    assert len(seen) == 1


def test_something_else_than_a_key_server_is_not_taken_for_one(openbao: RunningServer) -> None:
    with _http_server([]) as address:
        settings = msgspec.structs.replace(openbao.settings.vault, address=address, attempts=1)
        with (
            VaultClient(
                settings=settings, role="gateway", credentials=FixedToken(token="t")
            ) as client,
            pytest.raises(VaultUnavailableError, match="not a JSON object"),
        ):
            TransitKeyWrapper(client).wrap([REQUEST])


def test_a_server_with_another_certificate_gets_no_token(
    openbao: RunningServer, tmp_path: Path
) -> None:
    settings = other_settings(openbao, ca_file="")
    with (
        VaultClient(settings=settings, role="gateway", credentials=FixedToken(token="t")) as client,
        pytest.raises(VaultUnavailableError, match="certificate was not accepted"),
    ):
        client.call("GET", "auth/token/lookup-self")


@pytest.mark.parametrize(
    "address",
    ["http://vault.example:8200", "vault.example", "https://u:p@vault", "ftp://vault", ""],
)
def test_refuses_an_address_that_is_not_https(openbao: RunningServer, address: str) -> None:
    settings = msgspec.structs.replace(openbao.settings.vault, address=address)
    with pytest.raises(KeyConfigurationError):
        VaultClient(settings=settings, role="gateway", credentials=FixedToken(token="t"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_refuses_credentials_that_others_can_read(
    openbao: RunningServer, tmp_path: Path, mode: int
) -> None:
    files = credentials(tmp_path)
    Path(files.secret_id_file).chmod(mode)
    with (
        VaultClient(settings=other_settings(openbao), role="gateway", credentials=files) as client,
        pytest.raises(KeyConfigurationError, match="chmod 0600"),
    ):
        client.token_ttl_s()


@pytest.mark.parametrize(
    "path", ["../audit", "a//b", "a/../b", "", "a?b", ".", "a/.b", "a b", "/a"]
)
def test_a_path_never_reaches_outside_its_root(path: str) -> None:
    with pytest.raises(KeyConfigurationError):
        check_path(path)


# --- KV
# ----------------------------------------------------------------------------------------------


def test_a_deleted_secret_is_gone_in_all_versions(
    openbao: RunningServer, vault: Callable[[str], VaultClient]
) -> None:
    store = KVStore(vault("gateway"), "gateway")
    assert store.read("otp/person-1") is None
    assert store.write("otp/person-1", {"seed": "one"}) == 1
    assert store.write("otp/person-1", {"seed": "two"}) == 2
    assert store.read("otp/person-1") == {"seed": "two"}
    store.delete("otp/person-1")
    assert store.read("otp/person-1") is None
    with openbao.embedded.administer() as admin, pytest.raises(VaultRejectedError):
        admin.call("GET", f"{admin.layout.kv}/data/gateway/otp/person-1?version=1")


# --- Helpers
# -----------------------------------------------------------------------------------------


def credentials(directory: Path, *, role_id: bytes = b"no-such-role") -> RoleSettings:
    for name, content in (("role-id", role_id), ("secret-id", b"made-up")):
        path = directory / name
        path.write_bytes(content)
        path.chmod(0o600)
    return RoleSettings(
        role_id_file=str(directory / "role-id"), secret_id_file=str(directory / "secret-id")
    )


def _succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except VaultUnavailableError:
        return False
    return True


@contextmanager
def _http_server(seen: list[str], *, redirect_to: str = "") -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(307 if redirect_to else 200)
            if redirect_to:
                self.send_header("Location", redirect_to + self.path)
            body = b"<html>Welcome</html>"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
