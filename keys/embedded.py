"""The OpenBao that Havengate brings, for whoever has no key server of his own.

The first process that asks starts the server and owns it; others on the machine that name the same
directory attach to it, and one of them takes over when the owner ends. What must happen on the
first start is done in steps, each of which leaves a file, so that a start that was cut short is
continued. The process is kept by `keys.openbao_process`, the set-up done by `keys.bootstrap`,
calls made by `keys.vault`.

Files (the directory is 0700, every file 0600): `lock` says who owns the server; `server.json`
where it listens; `seal.key` unseals it; `recovery.json` holds the recovery share; `root.token`
exists only during the first start; `bootstrapped` names the set-up that was completed;
`credentials/` holds the AppRoles'.
"""

from __future__ import annotations

import base64
import datetime as dt
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec
import structlog

from keys.bootstrap import ROLES, bootstrap, credential_files, fingerprint
from keys.errors import (
    EmbeddedServerError,
    KeysError,
    VaultDeniedError,
    VaultError,
    VaultUnavailableError,
)
from keys.loopback_tls import ensure_loopback_tls
from keys.openbao_process import OpenBaoProcess, ServerFiles, free_port, render_configuration
from keys.private_files import (
    make_private_directory,
    read_private,
    read_private_text,
    write_private,
)
from keys.settings import KeysSettings, RoleSettings
from keys.vault import FixedToken, VaultClient

_POLL_S = 0.05
_TAKEOVER_POLL_S = 0.25
_TAKEOVER_RETRY_S = 5.0
_PORT_TRIES = 3
#: While it starts, the server is asked again rather than waited for.
_PROBE_TIMEOUT_S = 1.0
_ADMINISTRATOR_TTL = "1h"

_LOG = structlog.get_logger("keys.embedded")


class _Listening(msgspec.Struct, frozen=True, kw_only=True):
    """`server.json`."""

    port: int


class EmbeddedServer:
    """A running server, ours or that of another process. Use it as a context manager.

    Entering raises `EmbeddedServerError`, with the last lines of the server's log, if it does not
    answer within `start_timeout_s` or its files do not fit together; and `KeyConfigurationError`
    for files that others can read.
    """

    def __init__(self, settings: KeysSettings) -> None:
        self._settings = settings
        self._files = ServerFiles(directory=Path(settings.embedded.directory).absolute())
        self._process: OpenBaoProcess | None = None
        self._lock_descriptor: int | None = None
        self._leaving = threading.Event()
        self._follower: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"EmbeddedServer(directory={str(self._files.directory)!r}, owned={self.owned})"

    def __enter__(self) -> Self:
        try:
            self._enter()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def owned(self) -> bool:
        """Whether this process runs the server."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id of the server if this process runs it and it is up."""
        return self._process.pid if self._process else None

    @property
    def address(self) -> str:
        """URL of the server. The port is kept from one start to the next while it is free."""
        return f"https://127.0.0.1:{self._listening().port}"

    @property
    def ca_file(self) -> Path:
        """The CA that the server's certificate is verified against."""
        return self._files.tls / "ca.pem"

    @property
    def audit_file(self) -> Path:
        """Where the server writes its own audit log."""
        return self._files.audit_log

    @property
    def credentials_directory(self) -> Path:
        """Where `keys.bootstrap` leaves the credentials of roles."""
        return self._files.directory / "credentials"

    def credentials(self, role: str) -> RoleSettings:
        """Return where the credentials of `role` lie."""
        return credential_files(self.credentials_directory, role)

    def client(self, role: str) -> VaultClient:
        """Return a client logged in as `role` on first use. The caller closes it."""
        return self._client(role, self.credentials(role))

    def login(self, name: str, files: RoleSettings) -> VaultClient:
        """As `client`, for a login that a person brings along, such as an officer's."""
        return self._client(name, files)

    @contextmanager
    def administer(self) -> Iterator[VaultClient]:
        """Give a client that may do everything, for the length of a `with` block.

        A root token is made with the recovery share and at once replaced by one that ends by itself
        and is revoked at the end: a process that is killed in the block leaves none that lasts.
        """
        token = self._generate_short_lived_root()
        with self._client("administrator", FixedToken(token=token)) as client:
            try:
                yield client
            finally:
                client.call("POST", "auth/token/revoke-self", {})

    def close(self) -> None:
        """Stop the server if this process runs it, and let go of it otherwise."""
        self._leaving.set()
        if self._follower is not None:
            self._follower.join()
            self._follower = None
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    # --- Owner or guest --------------------------------------------------------------------------

    def _enter(self) -> None:
        make_private_directory(self._files.directory)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock_descriptor = os.open(self._files.directory / "lock", flags, 0o600)
        deadline = time.monotonic() + self._settings.embedded.start_timeout_s
        while not self._try_lock():
            # Somebody else owns the server: it is theirs to start. They may also be just leaving.
            if self._is_ready():
                self._follow()
                return
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"Another process holds {self._files.directory} but its key server does not "
                    f"answer after {self._settings.embedded.start_timeout_s:g} s. Look at that "
                    f"process and at {self._files.server_log}."
                )
            time.sleep(_POLL_S)
        self._serve()

    def _try_lock(self) -> bool:
        if self._lock_descriptor is None:
            return False
        try:
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_ready(self) -> bool:
        """Whether the owner's server answers and has been set up.

        By a process with other settings too: that is said in the log, for the owner to be
        restarted.
        """
        stands = self._bootstrapped()
        if stands is None:
            return False
        try:
            with self._client("guest", FixedToken(token="")) as client:
                active = _is_active(client)
        except KeysError:
            return False
        if stands != fingerprint(self._settings):
            _LOG.warning("keys.embedded.settings_differ", directory=str(self._files.directory))
        return active

    def _withdraw(self) -> None:
        """Leave the server to others."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._lock_descriptor is not None:
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_UN)

    def _follow(self) -> None:
        """Wait in the background for the owner to end, then run the server ourselves."""

        def wait_for_the_owner_to_end() -> None:
            pause_s = _TAKEOVER_POLL_S
            while not self._leaving.wait(pause_s):
                if self._try_lock():
                    try:
                        self._serve()
                    except (KeysError, OSError) as error:
                        _LOG.exception("keys.embedded.takeover_failed", error=str(error))
                        self._withdraw()
                        pause_s = _TAKEOVER_RETRY_S
                    else:
                        return

        self._follower = threading.Thread(
            target=wait_for_the_owner_to_end, name="openbao-follower", daemon=True
        )
        self._follower.start()

    # --- Starting --------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Start the server, initialise it if it is new, and set it up. The lock is held."""
        files = self._files
        self._ensure_seal_key()
        make_private_directory(files.storage)
        self._start_process()
        with self._client("setup", FixedToken(token="")) as client:
            if not client.health().initialized:
                self._initialise(client)
            self._wait_until(partial(_is_active, client), "unseal itself and become active")
        if self._bootstrapped() != fingerprint(self._settings) or self._login_is_missing():
            self._set_up()
        self._forget_first_root_token()

    def _start_process(self) -> None:
        """Start the server and wait until it answers."""
        files = self._files
        tls = ensure_loopback_tls(files.tls, dt.datetime.now(dt.UTC))
        port = self._remembered_port()
        for tries_left in reversed(range(_PORT_TRIES)):
            port = free_port(port)
            write_private(files.configuration, render_configuration(files, tls, port).encode())
            listening = msgspec.json.encode(_Listening(port=port))
            write_private(files.directory / "server.json", listening)
            self._process = OpenBaoProcess(files)
            self._process.start()
            try:
                with self._client("setup", FixedToken(token="")) as client:
                    self._wait_until(partial(_answers, client), "answer")
            except EmbeddedServerError as error:
                # Somebody took the port between our look and the server's.
                if "address already in use" not in str(error) or not tries_left:
                    raise
                self._process.stop()
                port = None
            else:
                return

    def _ensure_seal_key(self) -> None:
        if self._files.seal_key.exists():
            read_private(self._files.seal_key)
        elif self._files.storage.exists() and any(self._files.storage.iterdir()):
            raise EmbeddedServerError(
                f"{self._files.seal_key} is missing, but {self._files.storage} holds data that "
                "only it can open. Put the key back from your backup; nothing was changed."
            )
        else:
            write_private(self._files.seal_key, secrets.token_bytes(32))

    def _initialise(self, client: VaultClient) -> None:
        recovery = self._files.directory / "recovery.json"
        if recovery.exists() or self._bootstrapped():
            raise EmbeddedServerError(
                f"The storage {self._files.storage} is empty, but this server was initialised "
                "before. Put the storage back from your backup. If you mean to start with nothing, "
                f"move {self._files.directory} away first; nothing was changed."
            )
        answer = client.call(
            "POST",
            "sys/init",
            {"recovery_shares": 1, "recovery_threshold": 1},
            idempotent=False,
        )
        share = {"recovery_key": answer["recovery_keys_base64"][0]}
        write_private(recovery, msgspec.json.encode(share))
        write_private(self._files.directory / "root.token", answer["root_token"].encode("ascii"))

    def _set_up(self) -> None:
        root = self._files.directory / "root.token"
        if root.exists():
            token = FixedToken(token=read_private_text(root))
            with self._client("administrator", token) as client:
                self._bootstrap_with(client)
        else:
            with self.administer() as client:
                self._bootstrap_with(client)

    def _bootstrap_with(self, client: VaultClient) -> None:
        bootstrap(client, self._settings, self.credentials_directory)
        done = fingerprint(self._settings)
        write_private(self._files.directory / "bootstrapped", done.encode("ascii"))

    def _forget_first_root_token(self) -> None:
        root = self._files.directory / "root.token"
        if not root.exists():
            return
        token = FixedToken(token=read_private_text(root))
        # Denied: it was revoked before an interruption that left only the file.
        with self._client("administrator", token) as client, suppress(VaultDeniedError):
            client.call("POST", "auth/token/revoke-self", {})
        root.unlink()

    def _generate_short_lived_root(self) -> str:
        with self._client("setup", FixedToken(token=self._generate_root())) as client:
            life = {"ttl": _ADMINISTRATOR_TTL, "explicit_max_ttl": _ADMINISTRATOR_TTL}
            answer = client.call(
                "POST",
                "auth/token/create-orphan",
                {"policies": ["root"], "renewable": False, **life},
            )
            client.call("POST", "auth/token/revoke-self", {})
        token: str = answer["auth"]["client_token"]
        return token

    def _generate_root(self) -> str:
        """Return a fresh root token (`sys/generate-root`, sealed to a one-time password)."""
        recovery = self._files.directory / "recovery.json"
        if not recovery.exists():
            raise EmbeddedServerError(
                f"{recovery} is missing. If this server's first start was interrupted, nothing is "
                f"stored in it yet: move {self._files.directory} away and start again. Otherwise "
                "put the file back from your backup."
            )
        share = msgspec.json.decode(read_private(recovery), type=dict[str, str])["recovery_key"]
        with self._client("setup", FixedToken(token="")) as client:
            client.call("DELETE", "sys/generate-root/attempt")
            attempt = client.call("POST", "sys/generate-root/attempt", {}, idempotent=False)
            answer = client.call(
                "POST", "sys/generate-root/update", {"key": share, "nonce": attempt["nonce"]}
            )
        return _decode_root_token(answer, attempt["otp"])

    # --- Small things ----------------------------------------------------------------------------

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._settings.embedded.start_timeout_s
        while True:
            try:
                if condition():
                    return
            except VaultUnavailableError:
                pass
            failed = self._process is not None and self._process.exits > 1
            if failed or time.monotonic() > deadline or self._leaving.is_set():
                lines = self._process.last_lines() if self._process else ""
                raise EmbeddedServerError(
                    f"The embedded key server did not {what} within "
                    f"{self._settings.embedded.start_timeout_s:g} s. The last lines of "
                    f"{self._files.server_log}:\n{lines}"
                )
            time.sleep(_POLL_S)

    def _client(self, role: str, credentials: RoleSettings | FixedToken) -> VaultClient:
        settings = msgspec.structs.replace(
            self._settings.vault, address=self.address, ca_file=str(self.ca_file), namespace=""
        )
        if isinstance(credentials, FixedToken):
            # Setting up takes the server seconds (a raft election), and half done is worse than
            # late.
            patience_s = self._settings.embedded.start_timeout_s
            settings = msgspec.structs.replace(
                settings, timeout_s=patience_s, deadline_s=patience_s
            )
        return VaultClient(settings=settings, role=role, credentials=credentials)

    def _listening(self) -> _Listening:
        try:
            content = read_private(self._files.directory / "server.json")
            return msgspec.json.decode(content, type=_Listening)
        except msgspec.DecodeError as error:
            raise EmbeddedServerError(
                f"{self._files.directory / 'server.json'} is damaged; remove it and start again."
            ) from error

    def _remembered_port(self) -> int | None:
        if not (self._files.directory / "server.json").exists():
            return None
        try:
            return self._listening().port
        except EmbeddedServerError:
            # Only the preference for a port is lost.
            return None

    def _login_is_missing(self) -> bool:
        logins = [self.credentials(role) for role in ROLES]
        files = [name for login in logins for name in (login.role_id_file, login.secret_id_file)]
        return not all(Path(name).exists() for name in files)

    def _bootstrapped(self) -> str | None:
        path = self._files.directory / "bootstrapped"
        return read_private_text(path) if path.exists() else None


def verify_audit_file(server: EmbeddedServer, client: VaultClient) -> None:
    """Make one audited call and raise `EmbeddedServerError` unless the server's audit file grew.

    OpenBao goes on answering when its audit file was unlinked or replaced, and writes to nowhere.
    `client` must be logged in.
    """
    client.token_ttl_s()
    before = _size(server.audit_file)
    client.call("GET", "auth/token/lookup-self")
    after = _size(server.audit_file)
    if before is None or after is None or after <= before:
        raise EmbeddedServerError(
            f"The key server does not write to its audit file {server.audit_file}: it was removed, "
            "replaced or truncated while the server ran. Find out by whom, then restart the server."
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _answers(client: VaultClient) -> bool:
    client.health(timeout_s=_PROBE_TIMEOUT_S)
    return True


def _is_active(client: VaultClient) -> bool:
    health = client.health(timeout_s=_PROBE_TIMEOUT_S)
    return health.initialized and not health.sealed and not health.standby


def _decode_root_token(answer: dict[str, Any], one_time_password: str) -> str:
    text = answer.get("encoded_token") or answer.get("encoded_root_token")
    if not text:
        raise VaultError("The key server did not accept its recovery share.")
    encoded = base64.b64decode(text + "=" * (-len(text) % 4))
    pad = one_time_password.encode("ascii")
    return bytes(a ^ b for a, b in zip(encoded, pad, strict=True)).decode("ascii")
