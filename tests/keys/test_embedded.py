"""The server that Havengate brings: its first start, its restarts, its sharing and its end."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from keys import die_with_parent, embedded, private_files
from keys.embedded import EmbeddedServer, verify_audit_file
from keys.errors import (
    EmbeddedServerError,
    KeyConfigurationError,
    VaultDeniedError,
    VaultUnavailableError,
)
from keys.openbao_process import free_port
from keys.ports import WrapRequest
from keys.server import ExternalServer, open_server, open_vault, server_status, with_environment
from keys.settings import EmbeddedSettings, KeysSettings, RoleSettings, VaultSettings
from keys.transit import TransitKeyWrapper
from keys.vault import FixedToken
from tests.openbao import RunningServer, running_server, wait_until

REQUEST = WrapRequest(context=b"clinic/person", key=bytes(range(32)))

OTHER_PROCESS = """
import sys, time
from keys.embedded import EmbeddedServer
from keys.settings import EmbeddedSettings, KeysSettings
with EmbeddedServer(KeysSettings(embedded=EmbeddedSettings(directory=sys.argv[1]))) as server:
    print(server.owned, server.pid, flush=True)
    sys.stdin.read()
"""


def new_settings(directory: Path) -> KeysSettings:
    embedded_settings = EmbeddedSettings(directory=str(directory / "openbao"), start_timeout_s=60.0)
    return KeysSettings(embedded=embedded_settings)


@pytest.fixture
def settings(tmp_path: Path) -> KeysSettings:
    return new_settings(tmp_path)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> KeysSettings:
    """A server that was started before and stands still now."""
    settings = new_settings(tmp_path_factory.mktemp("used"))
    with EmbeddedServer(settings):
        pass
    return settings


@contextmanager
def other_process(
    settings: KeysSettings,
) -> Iterator[tuple[subprocess.Popen[str], bool, int | None]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, settings.embedded.directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(embedded.__file__).parents[1],
    )
    assert process.stdout is not None
    try:
        owned, pid = process.stdout.readline().split()
        yield process, owned == "True", None if pid == "None" else int(pid)
    finally:
        process.kill()
        process.communicate()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def wraps(server: EmbeddedServer) -> bool:
    with server.client("gateway") as client:
        try:
            return len(TransitKeyWrapper(client).wrap([REQUEST])) == 1
        except VaultUnavailableError:
            return False


# --- Restart and end
# -------------------------------------------------------------------------------


def test_restarts_with_its_data_on_its_port(used: KeysSettings) -> None:
    with EmbeddedServer(used) as server, server.client("gateway") as client:
        address = server.address
        wrapped = TransitKeyWrapper(client).wrap([REQUEST])
    with EmbeddedServer(used) as server, server.client("gateway") as client:
        assert server.address == address
        assert TransitKeyWrapper(client).unwrap(wrapped) == [REQUEST.key]


def test_is_stopped_when_closed(used: KeysSettings) -> None:
    with EmbeddedServer(used) as server:
        pid = server.pid
    assert pid is not None
    assert not is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_dies_with_its_parent_even_on_kill_9_and_starts_again_with_its_data(
    used: KeysSettings,
) -> None:
    with EmbeddedServer(used) as server, server.client("gateway") as client:
        wrapped = TransitKeyWrapper(client).wrap([REQUEST])
    with other_process(used) as (parent, owned, pid):
        assert owned
        assert pid is not None
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
    with EmbeddedServer(used) as server, server.client("gateway") as client:
        assert TransitKeyWrapper(client).unwrap(wrapped) == [REQUEST.key]


def test_the_guard_for_other_systems_ends_its_child_when_the_parent_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", die_with_parent.__file__, "pipe", str(os.getpid())]
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen(
        [*command, sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as guard:
        assert guard.stdout is not None
        assert guard.stdin is not None
        pid = int(guard.stdout.readline())
        guard.stdin.close()
        wait_until(lambda: not is_alive(pid))


def test_the_guard_ends_its_child_when_it_is_asked_to_stop() -> None:
    command = [sys.executable, "-I", "-S", die_with_parent.__file__, "pipe", str(os.getpid())]
    with subprocess.Popen([*command, "/bin/sleep", "600"], stdin=subprocess.PIPE) as guard:
        time.sleep(0.5)
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(10) != 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_server_whose_parent_died_before_it_began_never_runs() -> None:
    command = [sys.executable, "-I", "-S", die_with_parent.__file__, "kernel", "1"]
    assert subprocess.run([*command, "/bin/true"], check=False).returncode == 71


# --- Sharing
# -----------------------------------------------------------------------------------------


def test_a_second_process_joins_and_starts_nothing(used: KeysSettings) -> None:
    with EmbeddedServer(used) as server, other_process(used) as (_, owned, pid):
        assert (owned, pid) == (False, None)
        assert server.owned
        assert wraps(server)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_takes_over_when_the_owner_ends(used: KeysSettings, how: signal.Signals) -> None:
    with other_process(used) as (owner, owned, _), EmbeddedServer(used) as guest:
        assert owned
        assert not guest.owned
        assert wraps(guest)
        address = guest.address
        owner.send_signal(how)
        wait_until(lambda: guest.owned and wraps(guest))
        assert guest.address == address


def test_two_openings_in_one_process_share_one_server(used: KeysSettings) -> None:
    with open_vault(used, "gateway", environ={}) as gateway:
        with open_vault(used, "audit", environ={}) as audit:
            assert gateway.address == audit.address
            assert audit.token_ttl_s() > 0
        assert gateway.token_ttl_s() > 0


def test_an_owner_that_does_not_answer_is_reported(used: KeysSettings) -> None:
    impatient = msgspec.structs.replace(
        used, embedded=msgspec.structs.replace(used.embedded, start_timeout_s=1.0)
    )
    with EmbeddedServer(used) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EmbeddedServerError, match="Another process holds"):
                EmbeddedServer(impatient).__enter__()
        finally:
            os.kill(server.pid, signal.SIGCONT)


# --- Files
# -------------------------------------------------------------------------------------------


def test_everything_it_leaves_is_closed_to_others_whatever_the_umask(
    settings: KeysSettings,
) -> None:
    umask = os.umask(0)
    try:
        with EmbeddedServer(settings) as server, server.client("gateway") as client:
            TransitKeyWrapper(client).wrap([REQUEST])
    finally:
        os.umask(umask)
    root = Path(settings.embedded.directory)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (root, *root.rglob("*"))}
    assert len(modes) > 20
    assert {path for path, mode in modes.items() if mode & 0o077} == set()


def test_no_root_token_is_left_after_the_first_start(settings: KeysSettings) -> None:
    tokens: list[str] = []
    write = private_files.write_private

    def noting(path: Path, content: bytes) -> None:
        if path.name == "root.token":
            tokens.append(content.decode())
        write(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "write_private", noting)
        with EmbeddedServer(settings) as server:
            [token] = tokens
            fixed = FixedToken(token=token)
            with (
                server._client("administrator", fixed) as client,
                pytest.raises(VaultDeniedError),
            ):
                client.call("GET", "auth/token/lookup-self")
    for path in Path(settings.embedded.directory).rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()


def test_no_token_without_an_end_exists_while_the_server_is_administered(
    used: KeysSettings,
) -> None:
    with EmbeddedServer(used) as server, server.administer() as admin:
        accessors = admin.call("LIST", "auth/token/accessors")["data"]["keys"]
        for accessor in accessors:
            found = admin.call("POST", "auth/token/lookup-accessor", {"accessor": accessor})["data"]
            assert 0 < found["ttl"] <= 24 * 3600
            assert not found["renewable"] or "root" not in found["policies"]


@pytest.mark.parametrize("name", ["gateway.secret-id", "audit.role-id"])
def test_a_lost_login_is_issued_again_at_the_next_start(used: KeysSettings, name: str) -> None:
    (Path(used.embedded.directory) / "credentials" / name).unlink()
    with EmbeddedServer(used) as server, server.client(name.partition(".")[0]) as client:
        assert client.token_ttl_s() > 0


@pytest.mark.parametrize("name", ["", "seal.key", "recovery.json"])
def test_refuses_files_that_others_can_read(used: KeysSettings, name: str) -> None:
    path = Path(used.embedded.directory) / name
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | 0o044)
    try:
        with (
            pytest.raises(KeyConfigurationError, match="chmod"),
            EmbeddedServer(used) as server,
            server.administer(),
        ):
            pass
    finally:
        path.chmod(mode)


def test_the_callers_environment_does_not_reach_the_server(
    used: KeysSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAO_SEAL_TYPE", "transit")
    monkeypatch.setenv("VAULT_TOKEN", "not-for-the-server")
    with EmbeddedServer(used) as server:
        assert wraps(server)


def test_another_port_is_taken_when_the_remembered_one_is_not_free(used: KeysSettings) -> None:
    with EmbeddedServer(used) as server:
        port = int(server.address.rpartition(":")[2])
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with EmbeddedServer(used) as server:
            assert not server.address.endswith(f":{port}")
            assert wraps(server)


def test_a_port_that_is_snatched_away_is_replaced(
    used: KeysSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked: list[int | None] = []

        def snatched(preferred: int | None) -> int:
            asked.append(preferred)
            return int(taken.getsockname()[1]) if len(asked) == 1 else free_port(preferred)

        monkeypatch.setattr(embedded, "free_port", snatched)
        with EmbeddedServer(used) as server:
            assert wraps(server)
        assert len(asked) == 2


# --- A first start that is cut short
# -----------------------------------------------------------------


class CutError(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("write", [1, 6, 7, 8, 13, 17])
def test_a_first_start_cut_short_after_any_write_is_continued(
    settings: KeysSettings, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    seen = 0
    sync = private_files.sync_directory

    def cut(path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == write:
            raise CutError
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(private_files, "sync_directory", cut)
        with pytest.raises(CutError):
            EmbeddedServer(settings).__enter__()
    with EmbeddedServer(settings) as server:
        assert wraps(server)
        with server.administer() as admin:
            assert admin.call("GET", "auth/token/lookup-self")["data"]["policies"] == ["root"]
    assert not (Path(settings.embedded.directory) / "root.token").exists()


def test_a_first_start_whose_recovery_share_was_lost_is_reported_with_the_next_step(
    settings: KeysSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = private_files.write_private

    def cut(path: Path, content: bytes) -> None:
        if path.name == "recovery.json":
            raise CutError
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "write_private", cut)
        with pytest.raises(CutError):
            EmbeddedServer(settings).__enter__()
    for _ in range(2):
        with pytest.raises(EmbeddedServerError, match=r"move .*openbao away and start again"):
            EmbeddedServer(settings).__enter__()


def test_never_starts_with_nothing_over_a_server_that_held_something(used: KeysSettings) -> None:
    directory = Path(used.embedded.directory)
    for name, complaint in (("data", "storage"), ("seal.key", "seal.key is missing")):
        kept = directory.parent / name
        (directory / name).rename(kept)
        try:
            with pytest.raises(EmbeddedServerError, match=complaint):
                EmbeddedServer(used).__enter__()
        finally:
            if (directory / name).exists():
                (directory / name).rename(directory.parent / f"made-{name}")
            kept.rename(directory / name)
    with EmbeddedServer(used) as server:
        assert wraps(server)


def test_a_server_that_does_not_start_says_why(settings: KeysSettings) -> None:
    with EmbeddedServer(settings):
        pass
    (Path(settings.embedded.directory) / "data" / "vault.db").write_bytes(b"not a database" * 999)
    with pytest.raises(EmbeddedServerError, match=r"last lines of[^\n]*openbao\.log:\n.+"):
        EmbeddedServer(settings).__enter__()


# --- The server's own audit file
# -----------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path) as server:
        yield server


def test_a_lost_audit_file_of_the_server_is_noticed(own_server: RunningServer) -> None:
    audit_file = own_server.embedded.audit_file
    with own_server.client("audit") as client:
        verify_audit_file(own_server.embedded, client)
        kept = audit_file.with_suffix(".kept")
        audit_file.rename(kept)
        with pytest.raises(EmbeddedServerError, match="does not write"):
            verify_audit_file(own_server.embedded, client)
        audit_file.write_bytes(kept.read_bytes())
        with pytest.raises(EmbeddedServerError, match="does not write"):
            verify_audit_file(own_server.embedded, client)
    with own_server.stopped():
        pass
    with own_server.client("audit") as client:
        verify_audit_file(own_server.embedded, client)


def test_keys_and_tokens_do_not_stand_in_the_servers_own_logs(own_server: RunningServer) -> None:
    with own_server.client("gateway") as client:
        wrapped = TransitKeyWrapper(client).wrap([REQUEST])
        assert client._token is not None
        token = client._token.value
    text = own_server.embedded.audit_file.read_text()
    text += own_server.embedded.audit_file.with_name("openbao.log").read_text()
    assert "transit/encrypt/kek" in text
    assert token not in text
    assert wrapped[0].text not in text


# --- Which server
# ----------------------------------------------------------------------------------------


def test_a_configured_server_is_used_and_none_started(
    openbao: RunningServer, tmp_path: Path
) -> None:
    roles = {"gateway": openbao.embedded.credentials("gateway")}
    settings = KeysSettings(
        vault=VaultSettings(roles=roles),  # type: ignore[arg-type] # a dict of one role is one
        embedded=EmbeddedSettings(directory=str(tmp_path / "openbao")),
    )
    environ = {
        "VAULT_ADDR": openbao.embedded.address,
        "VAULT_CACERT": str(openbao.embedded.ca_file),
    }
    with open_vault(settings, "gateway", environ=environ) as client:
        assert TransitKeyWrapper(client).wrap([REQUEST])
        status = server_status(client)
        assert (status.reachable, status.sealed, status.problem) == (True, False, "")
        assert status.token_ttl_s > 0
    with open_server(settings, environ=environ) as server:
        with pytest.raises(KeyConfigurationError, match=r"keys\.vault\.roles\.audit"):
            server.client("audit")
        assert isinstance(server, ExternalServer)
    assert not (tmp_path / "openbao").exists()


def test_the_file_comes_before_the_environment() -> None:
    stated = VaultSettings(address="https://a:1", ca_file="a.pem", namespace="a")
    environ = {"VAULT_ADDR": "https://b:1", "VAULT_CACERT": "b.pem", "VAULT_NAMESPACE": "b"}
    assert with_environment(stated, environ) == stated
    completed = with_environment(VaultSettings(), environ)
    assert (completed.address, completed.ca_file) == ("https://b:1", "b.pem")
    assert completed.namespace == "b"


def test_the_status_of_a_server_that_is_away_is_told_without_an_error(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    server = ExternalServer(
        settings=VaultSettings(
            address=address,
            roles={"node": RoleSettings(role_id_file="none", secret_id_file="none")},
        )
    )
    with server.client("node") as client:
        status = server_status(client)
    assert (status.reachable, status.problem) == (False, "keys.vault_unavailable")


def test_closing_twice_is_harmless(used: KeysSettings) -> None:
    server = EmbeddedServer(used)
    with server, suppress(EmbeddedServerError):
        server.close()
    server.close()
