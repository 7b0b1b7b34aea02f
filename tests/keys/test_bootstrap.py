"""Set-up of a real server: done once, never undone, and each role within its duty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keys.bootstrap import Half, bootstrap, create_officer, credential_files, fingerprint
from keys.certificates import CertificateManager
from keys.errors import (
    ApprovalError,
    CertificateError,
    KeyConfigurationError,
    VaultDeniedError,
    VaultError,
    VaultRejectedError,
)
from keys.layout import COORDINATOR_NAME, FIRST_HALF_KEY, SECOND_HALF_KEY
from keys.ports import WrapRequest
from keys.private_files import write_private
from keys.settings import KeysSettings, PkiSettings, VaultSettings
from keys.transit import TransitKeyWrapper
from keys.vault import FixedToken, VaultClient
from tests.openbao import RunningServer

PREFIX = "havengate"
REQUEST = WrapRequest(context=b"pseudonym", key=b"half of what names a person")

type Call = tuple[str, str, dict[str, Any] | None]

#: Every duty, with the roles whose duty it is. All other roles must be denied.
DUTIES: dict[str, tuple[Call, frozenset[str]]] = {
    "wrap": (
        ("POST", "transit/encrypt/kek", {"plaintext": "AA==", "context": "AA=="}),
        frozenset({"gateway"}),
    ),
    "unwrap": (
        ("POST", "transit/decrypt/kek", {"ciphertext": "vault:v1:AAAA", "context": "AA=="}),
        frozenset({"gateway"}),
    ),
    "rewrap": (
        ("POST", "transit/rewrap/kek", {"ciphertext": "vault:v1:AAAA", "context": "AA=="}),
        frozenset({"operator"}),
    ),
    "read epochs": (("GET", "transit/keys/kek", None), frozenset({"gateway", "operator"})),
    "set minimum": (
        ("POST", "transit/keys/kek/config", {"min_decryption_version": 1}),
        frozenset({"operator"}),
    ),
    "trim": (
        ("POST", "transit/keys/kek/trim", {"min_available_version": 1}),
        frozenset({"operator"}),
    ),
    "rotate": (("POST", "transit/keys/identity/rotate", {}), frozenset({"operator"})),
    "sign the log": (("POST", "transit/sign/audit-log", {"input": "AA=="}), frozenset({"audit"})),
    "sign an identity": (
        ("POST", "transit/sign/identity", {"input": "AA=="}),
        frozenset({"gateway"}),
    ),
    "hash": (("POST", "transit/hmac/hmac/sha2-256", {"input": "AA=="}), frozenset({"gateway"})),
    "hand in a first half": (
        ("POST", "transit/encrypt/reid-first", {"plaintext": "AA==", "context": "AA=="}),
        frozenset({"gateway"}),
    ),
    "hand in a second half": (
        ("POST", "transit/encrypt/reid-second", {"plaintext": "AA==", "context": "AA=="}),
        frozenset({"gateway"}),
    ),
    "write a secret": (
        ("POST", "kv/data/gateway/duty", {"data": {"a": "b"}}),
        frozenset({"gateway"}),
    ),
    "read a secret": (("GET", "kv/data/gateway/duty", None), frozenset({"gateway"})),
    "ask for a server certificate": (
        ("POST", "pki/sign/server", {"csr": "x"}),
        frozenset({"gateway"}),
    ),
    "ask for a node certificate": (("POST", "pki/sign/node", {"csr": "x"}), frozenset({"node"})),
    "ask for the coordinator's certificate": (
        ("POST", "pki/sign/coordinator", {"csr": "x"}),
        frozenset({"coordinator"}),
    ),
    "ask for a certificate on the way out": (
        ("POST", "outbound-pki/sign/outbound", {"csr": "x"}),
        frozenset({"gateway"}),
    ),
}

#: What nobody may do, whatever the role.
FORBIDDEN: tuple[Call, ...] = (
    ("POST", "transit/keys/kek/config", {"exportable": True}),
    ("POST", "transit/keys/kek/config", {"deletion_allowed": True}),
    (
        "POST",
        "transit/keys/kek/config",
        {"min_decryption_version": 1, "allow_plaintext_backup": True},
    ),
    ("DELETE", "transit/keys/kek", None),
    ("GET", "transit/export/encryption-key/kek", None),
    ("GET", "transit/backup/kek", None),
    ("POST", "transit/datakey/plaintext/kek", {"context": "AA=="}),
    ("POST", "transit/keys/another", {"type": "aes256-gcm96"}),
    ("POST", "transit/encrypt/another", {"plaintext": "AA=="}),
    ("POST", "transit/decrypt/reid-first", {"ciphertext": "vault:v1:AAAA", "context": "AA=="}),
    ("POST", "transit/decrypt/reid-second", {"ciphertext": "vault:v1:AAAA", "context": "AA=="}),
    ("GET", "kv/data/operator/duty", None),
    ("POST", "pki/sign-verbatim", {"csr": "x"}),
    ("POST", "pki/issue/server", {"common_name": "localhost"}),
    ("POST", "pki/root/generate/internal", {"common_name": "x"}),
    ("DELETE", "pki/root", None),
    ("POST", "outbound-pki/sign-verbatim", {"csr": "x"}),
    ("POST", "outbound-pki/issue/outbound", {"common_name": "example.org"}),
    ("POST", "outbound-pki/root/sign-intermediate", {"csr": "x"}),
    ("POST", "outbound-pki/root/generate/exported", {"common_name": "x"}),
    ("DELETE", "outbound-pki/root", None),
    ("POST", "../auth/token/create", {}),
    ("GET", "../sys/mounts", None),
    ("POST", "../sys/seal", {}),
    ("POST", "../sys/policies/acl/havengate-gateway", {"policy": ""}),
    ("POST", "../auth/havengate/role/gateway/secret-id", {}),
    ("GET", "../sys/policies/acl/havengate-gateway", None),
    ("GET", "../cubbyhole/x", None),
)

ROLES = ("gateway", "audit", "operator", "node", "coordinator")


def attempt(client: VaultClient, call: Call) -> None:
    method, path, body = call
    full = path.removeprefix("../") if path.startswith("../") else f"{PREFIX}/{path}"
    client.call(method, full, body)


@pytest.mark.parametrize("duty", DUTIES)
@pytest.mark.parametrize("role", ROLES)
def test_a_role_does_its_duty_and_is_denied_any_other(
    vault: Callable[[str], VaultClient], role: str, duty: str
) -> None:
    call, allowed = DUTIES[duty]
    if role in allowed:
        # Rejected: the policy let it through; the made-up content was refused behind it.
        with suppress(VaultRejectedError):
            attempt(vault(role), call)
    else:
        with pytest.raises(VaultDeniedError):
            attempt(vault(role), call)


@pytest.mark.parametrize("call", FORBIDDEN, ids=lambda call: f"{call[0]} {call[1]}")
@pytest.mark.parametrize("role", ROLES)
def test_nobody_may(vault: Callable[[str], VaultClient], role: str, call: Call) -> None:
    with pytest.raises(VaultDeniedError):
        attempt(vault(role), call)


# --- Running it again
# ------------------------------------------------------------------------------


@pytest.fixture
def admin(openbao: RunningServer) -> Iterator[VaultClient]:
    with openbao.embedded.administer() as client:
        yield client


def test_running_it_again_changes_nothing(openbao: RunningServer, admin: VaultClient) -> None:
    directory = openbao.embedded.credentials_directory
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert bootstrap(admin, openbao.settings, directory).changed == ()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_policy_that_was_widened_is_put_right(
    openbao: RunningServer, admin: VaultClient, vault: Callable[[str], VaultClient]
) -> None:
    path = f"sys/policies/acl/{PREFIX}-node"
    admin.call("POST", path, {"policy": f'path "{PREFIX}/*" {{ capabilities = ["read"] }}'})
    attempt(vault("node"), ("GET", "transit/keys/kek", None))
    report = bootstrap(admin, openbao.settings, openbao.embedded.credentials_directory)
    assert report.changed == (path,)
    with pytest.raises(VaultDeniedError):
        attempt(vault("node"), ("GET", "transit/keys/kek", None))


def test_a_revoked_secret_is_issued_again(openbao: RunningServer, admin: VaultClient) -> None:
    files = credential_files(openbao.embedded.credentials_directory, "node")
    old = Path(files.secret_id_file).read_text()
    role = f"{admin.layout.approle}/role/node"
    admin.call("POST", f"{role}/secret-id/destroy", {"secret_id": old})
    report = bootstrap(admin, openbao.settings, openbao.embedded.credentials_directory)
    assert report.changed == (f"{role}/secret-id",)
    assert Path(files.secret_id_file).read_text() != old
    with openbao.client("node") as client:
        assert client.token_ttl_s() > 0


def other_prefix(
    openbao: RunningServer, admin: VaultClient, prefix: str
) -> tuple[VaultClient, VaultSettings]:
    settings = msgspec.structs.replace(
        openbao.settings.vault,
        address=admin.address,
        ca_file=str(openbao.embedded.ca_file),
        prefix=prefix,
    )
    assert isinstance(admin._credentials, FixedToken)
    return VaultClient(settings=settings, role="admin", credentials=admin._credentials), settings


def test_a_server_can_be_shared_by_two_installations(
    openbao: RunningServer, admin: VaultClient, tmp_path: Path
) -> None:
    client, settings = other_prefix(openbao, admin, "clinic-b")
    with client:
        shared = msgspec.structs.replace(openbao.settings, vault=settings)
        bootstrap(client, shared, tmp_path / "credentials")
        files = credential_files(tmp_path / "credentials", "gateway")
        with VaultClient(settings=settings, role="gateway", credentials=files) as gateway:
            wrapper = TransitKeyWrapper(gateway)
            assert wrapper.unwrap(wrapper.wrap([REQUEST])) == [REQUEST.key]
            with pytest.raises(VaultDeniedError):
                gateway.call("GET", f"{PREFIX}/transit/keys/kek")


@pytest.mark.parametrize(
    "domain", ["internal", "havengate-control.internal", COORDINATOR_NAME, ".Internal"]
)
def test_refuses_a_domain_in_which_the_coordinators_name_lies(domain: str) -> None:
    settings = KeysSettings(pki=PkiSettings(allowed_domains=("clinic.example", domain)))
    with pytest.raises(KeyConfigurationError, match="coordinator of studies"):
        fingerprint(settings)


def test_no_certificate_for_localhost_is_had_where_it_is_not_allowed(
    openbao: RunningServer, admin: VaultClient, tmp_path: Path
) -> None:
    client, vault_settings = other_prefix(openbao, admin, "clinic-l")
    pki = PkiSettings(allowed_domains=("clinic.example",))
    settings = msgspec.structs.replace(openbao.settings, vault=vault_settings, pki=pki)
    with client:
        bootstrap(client, settings, tmp_path / "credentials")
        files = credential_files(tmp_path / "credentials", "gateway")
        with VaultClient(settings=vault_settings, role="gateway", credentials=files) as gateway:
            for name, wanted in (("a.clinic.example", True), ("localhost", False)):
                manager = CertificateManager(
                    gateway, kind="server", names=[name], directory=tmp_path / name, settings=pki
                )
                if wanted:
                    assert manager.renew_if_due()
                else:
                    with pytest.raises(CertificateError):
                        manager.renew_if_due()


def test_a_secret_that_the_server_does_not_know_is_issued_again_whatever_it_answers(
    openbao: RunningServer,
    admin: VaultClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenBao says nothing about an unknown secret id; newer Vaults say 404."""
    call = VaultClient.call

    def as_vault(self: VaultClient, method: str, path: str, *rest: Any, **named: Any) -> Any:
        answer = call(self, method, path, *rest, **named)
        if path.endswith("secret-id/lookup") and not answer.get("data"):
            error = VaultRejectedError("no such secret id")
            error.status = 404
            raise error
        return answer

    monkeypatch.setattr(VaultClient, "call", as_vault)
    bootstrap(admin, openbao.settings, tmp_path / "credentials")
    files = credential_files(tmp_path / "credentials", "node")
    write_private(Path(files.secret_id_file), b"not-known")
    report = bootstrap(admin, openbao.settings, tmp_path / "credentials")
    assert report.changed == (f"{admin.layout.approle}/role/node/secret-id",)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "aes256-gcm96", "derived": True, "exportable": True},
        {"type": "aes256-gcm96", "derived": True, "allow_plaintext_backup": True},
        {"type": "aes256-gcm96", "derived": False},
        {"type": "chacha20-poly1305", "derived": True},
    ],
    ids=["exportable", "with backups", "not derived", "of another type"],
)
def test_a_key_that_could_leave_the_server_is_refused(
    openbao: RunningServer,
    admin: VaultClient,
    tmp_path: Path,
    options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    prefix = f"clinic-c-{abs(hash(request.node.callspec.id)) % 10**6}"
    client, settings = other_prefix(openbao, admin, prefix)
    with client:
        client.call("POST", f"sys/mounts/{prefix}/transit", {"type": "transit"})
        client.call("POST", f"{prefix}/transit/keys/kek", options)
        shared = msgspec.structs.replace(openbao.settings, vault=settings)
        with pytest.raises(KeyConfigurationError):
            bootstrap(client, shared, tmp_path / "credentials")


def test_a_mount_of_another_kind_is_not_taken_over(
    openbao: RunningServer, admin: VaultClient, tmp_path: Path
) -> None:
    client, settings = other_prefix(openbao, admin, "clinic-d")
    with client:
        client.call("POST", "sys/mounts/clinic-d/kv", {"type": "kv", "options": {"version": "1"}})
        shared = msgspec.structs.replace(openbao.settings, vault=settings)
        with pytest.raises(KeyConfigurationError, match="found kv 1"):
            bootstrap(client, shared, tmp_path / "credentials")


def test_a_role_may_not_set_the_server_up(
    openbao: RunningServer, vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with pytest.raises(VaultError):
        bootstrap(vault("operator"), openbao.settings, tmp_path / "credentials")


@pytest.mark.parametrize("prefix", ["", "Upper", "a/b", "..", "-a", "a" * 49, 'a" {}'])
def test_a_prefix_that_could_change_a_path_or_policy_is_refused(
    openbao: RunningServer, prefix: str
) -> None:
    settings = msgspec.structs.replace(openbao.settings.vault, prefix=prefix)
    with pytest.raises(KeyConfigurationError):
        VaultClient(
            settings=msgspec.structs.replace(settings, address="https://127.0.0.1:1"),
            role="gateway",
            credentials=openbao.embedded.credentials("gateway"),
        )


# --- Officers
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["first", "second"])
def test_an_officer_opens_one_half_and_nothing_else(
    openbao: RunningServer,
    admin: VaultClient,
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    half: Half,
) -> None:
    own, other = (
        (FIRST_HALF_KEY, SECOND_HALF_KEY) if half == "first" else (SECOND_HALF_KEY, FIRST_HALF_KEY)
    )
    gateway = vault("gateway")
    mine = TransitKeyWrapper(gateway, own).wrap([REQUEST])
    theirs = TransitKeyWrapper(gateway, other).wrap([REQUEST])
    name = f"officer-of-{half}"
    files = create_officer(admin, name, half, tmp_path / "officers")
    assert create_officer(admin, name, half, tmp_path / "officers") == files
    _, settings = other_prefix(openbao, admin, PREFIX)
    with VaultClient(settings=settings, role=name, credentials=files) as officer:
        assert TransitKeyWrapper(officer, own).unwrap(mine) == [REQUEST.key]
        with pytest.raises(VaultDeniedError):
            TransitKeyWrapper(officer, other).unwrap(theirs)
        for call, _ in DUTIES.values():
            with pytest.raises(VaultDeniedError):
                attempt(officer, call)


@pytest.mark.parametrize("halves", [("first", "second"), ("second", "first")])
def test_nobody_gets_both_halves(
    admin: VaultClient, tmp_path: Path, halves: tuple[Half, Half]
) -> None:
    name = f"greedy-{halves[0]}"
    create_officer(admin, name, halves[0], tmp_path / "officers")
    with pytest.raises(ApprovalError):
        create_officer(admin, name, halves[1], tmp_path / "officers")
    role = admin.call("GET", f"{admin.layout.approle}/role/officer-{name}")["data"]
    assert role["token_policies"] == [f"{PREFIX}-reidentify-{halves[0]}", f"{PREFIX}-self"]


@pytest.mark.parametrize("name", ["", "Dr. Who", "../gateway", "a/b"])
def test_an_officers_name_cannot_name_another_role(
    admin: VaultClient, tmp_path: Path, name: str
) -> None:
    with pytest.raises(KeyConfigurationError):
        create_officer(admin, name, "first", tmp_path / "officers")
