"""Where the files of one machine's federation lie, and the keys of its nodes.

```
DIRECTORY/
  federation.json          whom everybody believes (an enrolment, closed to others)
  roster.json              the nodes that the coordinator enrolled: public keys, Flower's ids
  superlink/               state.sqlite3, the two secrets, what the process was told, its log
  tls/superlink, tls/coordinator
  nodes/NAME/              fleet.pem, identity.pem, device.store, device.keys, node.json, its log
```
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from federated.errors import DeploymentError
from federated.manifest import roster_hash
from federated.node.contact import MAX_PEOPLE
from keys.private_files import make_private_directory, read_private, write_private

_SECRET_BYTES: Final = 32
#: For how many people a site may say that it speaks, where its enrolment names no other number.
MOST_PEOPLE: Final = 100_000
_LARGEST_FILE_BYTES: Final = 16 * 1024 * 1024
_KEY_BYTES: Final = 32
_CHARGED: Final = b"havengate/charged-key/v1\n"
#: Hex digits of a key's hash in the ledger: 128 bits, so that nobody finds two keys with one name.
_SHORT: Final = 32
#: With its class before it, a name must be one that the ledger takes.
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}").fullmatch
_SITE = re.compile(r"[a-z][a-z0-9_-]{0,63}").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The directory of one machine's federation. Everything below it is closed to others."""

    directory: Path

    @property
    def federation(self) -> Path:
        """Whom SuperLink and nodes of this machine believe."""
        return self.directory / "federation.json"

    @property
    def roster(self) -> Path:
        """The coordinator's list of nodes."""
        return self.directory / "roster.json"

    @property
    def superlink(self) -> Path:
        """The SuperLink's directory."""
        return self.directory / "superlink"

    @property
    def control_secret(self) -> Path:
        """What the coordinator shows the gate."""
        return self.superlink / "control.secret"

    @property
    def executor_secret(self) -> Path:
        """What the coordinator signs with when it claims a run (Flower's SuperExec secret)."""
        return self.superlink / "executor.secret"

    @property
    def superlink_files(self) -> Path:
        """What the SuperLink's process was told last: ports, certificate."""
        return self.superlink / "superlink.json"

    def tls(self, who: str) -> Path:
        """The directory of a certificate: `superlink`, `coordinator`."""
        return self.directory / "tls" / who

    def node(self, name: str) -> Path:
        """A node's directory."""
        return self.directory / "nodes" / name

    def prepare(self) -> None:
        """Make directories and secrets that are not there yet."""
        make_private_directory(self.directory)
        for below in (self.superlink, self.directory / "tls", self.directory / "nodes"):
            make_private_directory(below)
        for secret in (self.control_secret, self.executor_secret):
            if not secret.exists():
                write_private(secret, secrets.token_bytes(_SECRET_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKeys:
    """A node's two private keys: for Flower's Fleet API, and for what it signs in rounds."""

    fleet: ec.EllipticCurvePrivateKey
    identity: Ed25519PrivateKey

    @property
    def fleet_public(self) -> bytes:
        """PEM, as Flower registers it."""
        return self.fleet.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def identity_public(self) -> bytes:
        """Raw, 32 bytes, as rosters hold it."""
        return self.identity.public_key().public_bytes_raw()


def ensure_node_keys(directory: Path) -> NodeKeys:
    """Return the keys in a node's directory, made if they are not there yet."""
    make_private_directory(directory)
    fleet, identity = directory / "fleet.pem", directory / "identity.pem"
    if not fleet.exists():
        # OpenSSH's form, the only one that Flower's own SuperNode reads.
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(fleet, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    if not identity.exists():
        signing = Ed25519PrivateKey.generate()
        raw = signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(identity, raw)
    return read_node_keys(directory)


def read_node_keys(directory: Path) -> NodeKeys:
    """Read them. Raises `DeploymentError` if they are of another kind, `KeysError` if open."""
    try:
        fleet = load_ssh_private_key(read_private(directory / "fleet.pem"), None)
        identity = load_pem_private_key(read_private(directory / "identity.pem"), None)
    except ValueError as error:
        raise DeploymentError(f"A key in {directory} is damaged: enrol the node anew.") from error
    if not isinstance(fleet, ec.EllipticCurvePrivateKey) or not isinstance(
        identity, Ed25519PrivateKey
    ):
        raise DeploymentError(f"A key in {directory} is of another kind: enrol the node anew.")
    return NodeKeys(fleet=fleet, identity=identity)


class EnrolledNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node of the roster. `flower_id` is given by the SuperLink; text, for it needs 64 bits.

    `site` is empty for a person's own device. A site's people are charged as one class.
    `most_people` bounds for how many a site may say that it speaks; 0 for `MOST_PEOPLE`.
    """

    identity: str
    fleet: str
    flower_id: str
    site: str = ""
    most_people: int = 0

    @property
    def charged_key(self) -> str:
        """The ledger's name for whoever holds this key, whatever he is called meanwhile."""
        return f"key:{sha256(_CHARGED + bytes.fromhex(self.identity)).hexdigest()[:_SHORT]}"


class RosterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The coordinator's list, by the names under which nodes stand in studies."""

    nodes: dict[str, EnrolledNode] = {}

    def keys(self) -> dict[str, bytes]:
        """Node name → raw Ed25519 public key: what a study's roster is the hash of."""
        return {name: bytes.fromhex(node.identity) for name, node in self.nodes.items()}

    def flower_ids(self) -> dict[str, int]:
        """Node name → Flower's id."""
        return {name: int(node.flower_id) for name, node in self.nodes.items()}

    def sites(self) -> dict[str, str]:
        """Node name → site, of the nodes that speak for one."""
        return {name: node.site for name, node in self.nodes.items() if node.site}

    @property
    def hash(self) -> str:
        """What a study's `roster` must say: names, keys and sites."""
        return roster_hash(self.keys(), self.sites())

    def charged(self, name: str) -> list[str]:
        """Whom the ledger charges for this node's answer: the key, and the name beside it.

        A node or site under a new name still has its key's charges; under a new key, its name's.
        """
        node = self.nodes[name]
        return [node.charged_key, f"site:{node.site}" if node.site else f"device:{name}"]

    def most_people(self, name: str) -> int:
        """For how many people this node may say that it speaks: a device, for the one whose it is.

        So that no node can fill a cohort alone, nor make a request that every other refuses.
        """
        node = self.nodes[name]
        return (node.most_people or MOST_PEOPLE) if node.site else 1

    def terms(self, name: str, site: str) -> tuple[str, int]:
        """Site and `most_people` of a node that is enrolled, or enrolled again.

        What is known of it stays unless `site` names another: whoever starts the nodes anew does
        not make devices of sites.
        """
        known = self.nodes.get(name)
        if known is None or site not in {"", known.site}:
            return site, 0
        return known.site, known.most_people


def read_roster(path: Path) -> RosterFile:
    """Read the list; nobody is on one that is not there.

    Raises `DeploymentError` if it is damaged, or if one key has two names.
    """
    if not path.exists():
        return RosterFile()
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise DeploymentError(f"{path} is larger than any roster.")
        roster = msgspec.json.decode(path.read_bytes(), type=RosterFile)
        roster.flower_ids()
        _verify_nodes(roster)
        if not all(0 <= node.most_people <= MAX_PEOPLE for node in roster.nodes.values()):
            raise DeploymentError(f"{path}: `most_people` is a number from 0 to {MAX_PEOPLE}.")
    except (msgspec.DecodeError, ValueError) as error:
        raise DeploymentError(f"{path} is not a roster: {error}") from error
    return roster


def _verify_nodes(roster: RosterFile) -> None:
    """Names, sites and keys are such, and no key stands twice. Raises `ValueError`."""
    keys = roster.keys()
    if not all(map(_NODE, keys)) or not all(map(_SITE, roster.sites().values())):
        raise ValueError("a node or site has a name that the ledger cannot charge")
    if any(len(key) != _KEY_BYTES for key in keys.values()):
        raise ValueError("a node's key is not 32 bytes in hex")
    if len(set(keys.values())) != len(keys):
        raise ValueError("one key stands under two names")


def _verify_same(roster: RosterFile, name: str, node: EnrolledNode) -> None:
    for known, other in roster.nodes.items():
        if other.identity.lower() == node.identity.lower() and (known, other.site) != (
            name,
            node.site,
        ):
            who = f"for the site {other.site}" if other.site else "as a person's own device"
            raise DeploymentError(
                f"This key is enrolled under the name {known}, {who}: a node keeps its name and "
                "its site. Enrol it as it was, or make new keys for what is another node."
            )


def add_to_roster(path: Path, name: str, node: EnrolledNode) -> RosterFile:
    """Add a node, or leave it as it is.

    Raises `DeploymentError` if the name has other keys, or the key another name or site: what its
    people's data have cost stands under all three.
    """
    roster = read_roster(path)
    _verify_same(roster, name, node)
    known = roster.nodes.get(name)
    if known is not None and (known.identity, known.fleet) != (node.identity, node.fleet):
        raise DeploymentError(
            f"A node {name} is enrolled with other keys. Enrol this one under another name; what "
            "the first one's people have spent stays with its name and its key."
        )
    if known == node:
        return roster
    roster = RosterFile(nodes={**roster.nodes, name: node})
    try:
        _verify_nodes(roster)
    except ValueError as error:
        raise DeploymentError(f"The node {name[:128]!r} cannot be enrolled: {error}.") from error
    write_private(path, msgspec.json.format(msgspec.json.encode(roster)))
    return roster
