"""A whole federation on one machine: SuperLink and nodes as processes, with real TLS.

What `havengate federated up` runs. Children die with this process (`processes`); a SuperLink or
node that ends is started again; certificates are renewed while it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from federated.coordinator import link_access
from federated.deployment.certificates import Certificates
from federated.deployment.link import Link
from federated.deployment.node_files import NodeFiles
from federated.deployment.nursery import PID_FILE
from federated.deployment.places import (
    EnrolledNode,
    Places,
    RosterFile,
    add_to_roster,
    ensure_node_keys,
    read_roster,
)
from federated.deployment.processes import ChildProcess, wait_for_port
from federated.deployment.superlink import SuperLinkFiles
from federated.errors import DeploymentError
from federated.node.enrolment import parse_enrolment
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from keys.errors import EmbeddedServerError
from keys.layout import COORDINATOR_NAME
from keys.openbao_process import free_port
from keys.private_files import read_private, read_private_text, write_private

type Say = Callable[[str], None]

_START_S: Final = 120.0
_LOOK_S: Final = 0.2
_RENEW_LOOK_S: Final = 60.0
_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the SuperLink listens, on loopback: for the coordinator (HTTPS), for nodes (gRPC)."""

    http: int
    fleet: int


class Federation:
    """The processes of one machine. A context manager: leaving it stops them."""

    def __init__(
        self, places: Places, certificates: Certificates, *, say: Say = lambda _: None
    ) -> None:
        self._places = places
        self._certificates = certificates
        self._say = say
        self._stack = ExitStack()
        self._superlink: ChildProcess | None = None
        self._nursery: ChildProcess | None = None
        self._leaving = threading.Event()
        self.ports = _ports(places)

    def __enter__(self) -> Self:
        """Start the SuperLink and wait until it serves. Raises `DeploymentError`."""
        self._places.prepare()
        if not self._places.federation.exists():
            raise DeploymentError(
                f"{self._places.federation} is missing: it says whose approvals count. Write it "
                "with havengate federated trust, or copy it from whoever coordinates."
            )
        self._write_superlink_files()
        child = ChildProcess(
            "superlink",
            "federated.deployment.superlink",
            [str(self._places.superlink_files)],
            log_file=self._places.superlink / "superlink.log",
            environment={"FLWR_HOME": str(self._places.superlink / "flwr")},
        )
        self._superlink = child
        self._stack.callback(child.stop)
        try:
            self._say("starting the SuperLink")
            child.start()
            for port in (self.ports.http, self.ports.fleet):
                wait_for_port(_HOST, port, child, timeout_s=_START_S)
        except BaseException:
            self._stack.close()
            raise
        self._say(f"SuperLink: nodes on {_HOST}:{self.ports.fleet}, coordinator on "
                  f"{_HOST}:{self.ports.http}")  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """Stop nodes first, then the SuperLink."""
        self._leaving.set()
        self._stack.close()

    @property
    def link(self) -> Link:
        """The coordinator's connection."""
        return Link(link_access(self._places, address=f"{_HOST}:{self.ports.http}"))

    @property
    def superlink(self) -> ChildProcess:
        """The SuperLink's process."""
        if self._superlink is None:
            raise DeploymentError("The federation is not up.")
        return self._superlink

    def node_pid(self, name: str) -> int:
        """The process id of a node, as it was started last."""
        return int(read_private_text(self._places.node(name) / PID_FILE))

    def enrol(
        self, names: Sequence[str], *, site: Callable[[str], str] = lambda _: ""
    ) -> RosterFile:
        """Make keys and a store for each node that has none, and put them on the roster."""
        link, roster = self.link, read_roster(self._places.roster)
        for name in names:
            directory = self._places.node(name)
            keys = ensure_node_keys(directory)
            if not (directory / "device.store").exists():
                keeper = FileKeeper(directory / "device.keys")
                Store.create(directory / "device.store", keeper).close()
            own_site, most_people = roster.terms(name, site(name))
            node = EnrolledNode(
                identity=keys.identity_public.hex(),
                fleet=keys.fleet_public.decode("ascii"),
                flower_id=str(link.enrol(keys.fleet_public, name)),
                site=own_site,
                most_people=most_people,
            )
            roster = add_to_roster(self._places.roster, name, node)
        return roster

    def start_nodes(self, names: Sequence[str]) -> None:
        """Start the nodes and wait until the SuperLink knows all of them as online."""
        child = ChildProcess(
            "nodes",
            "federated.deployment.nursery",
            [str(self.write_node_files(name)) for name in names],
            log_file=self._places.directory / "nodes" / "nursery.log",
        )
        self._stack.callback(child.stop)
        self._nursery = child
        child.start()
        ids = read_roster(self._places.roster).flower_ids()
        self.wait_online({ids[name] for name in names})

    def wait_online(self, wanted: set[int], *, timeout_s: float = _START_S) -> None:
        """Return once all are online. Raises `DeploymentError` if one ended or time is over."""
        deadline, told, link = time.monotonic() + timeout_s, -1, self.link
        while True:
            there = len(wanted & link.online())
            if there != told:
                self._say(f"nodes online: {there} of {len(wanted)}")
                told = there
            if there == len(wanted):
                return
            for child in (self._superlink, self._nursery):
                if child is not None:
                    child.verify_running()
            if time.monotonic() > deadline:
                raise DeploymentError(
                    f"{there} of {len(wanted)} nodes are online after {timeout_s:g} s; see the "
                    f"files node.log below {self._places.directory / 'nodes'}."
                )
            time.sleep(_LOOK_S)

    def keep(self) -> None:
        """Stay until `leave`; renew certificates meanwhile."""
        while not self._leaving.wait(_RENEW_LOOK_S):
            self._certificates.coordinator.renew_if_due()
            if self._certificates.superlink.renew_if_due():
                # What it has in its database it still has; nodes and coordinator come back.
                self._write_superlink_files()
                self.superlink.renew()

    def leave(self) -> None:
        """Let `keep` return."""
        self._leaving.set()

    def _write_superlink_files(self) -> None:
        places, issued = self._places, self._certificates.superlink.current()
        files = SuperLinkFiles(
            host=_HOST,
            http_port=self.ports.http,
            fleet_port=self.ports.fleet,
            certificate_file=str(issued.certificate_file),
            key_file=str(issued.key_file),
            ca_file=str(issued.ca_file),
            database=str(places.superlink / "state.sqlite3"),
            control_secret_file=str(places.control_secret),
            executor_secret_file=str(places.executor_secret),
            coordinator_name=COORDINATOR_NAME,
            trust_file=str(places.federation),
        )
        write_private(places.superlink_files, msgspec.json.encode(files))

    def write_node_files(self, name: str) -> Path:
        """Write what a node's process is told, and whom it believes; return the file."""
        directory = self._places.node(name)
        believed = parse_enrolment(read_private(self._places.federation))
        own = msgspec.structs.replace(believed, node=name)
        write_private(directory / "enrolment.json", msgspec.json.encode(own))
        files = NodeFiles(
            superlink=f"{_HOST}:{self.ports.fleet}",
            ca_file=str(self._places.tls("superlink") / "current" / "ca.pem"),
            directory=str(directory),
            store=str(directory / "device.store"),
            key_file=str(directory / "device.keys"),
            enrolment=str(directory / "enrolment.json"),
        )
        write_private(directory / "node.json", msgspec.json.encode(files))
        return directory / "node.json"


def _ports(places: Places) -> Ports:
    """The ports of the last time if they are free, else others: nodes keep their address."""
    http: int | None = None
    fleet: int | None = None
    last = remembered(places)
    if last is not None:
        http, fleet = last.http_port, last.fleet_port
    try:
        return Ports(http=free_port(http), fleet=free_port(fleet))
    except EmbeddedServerError as error:
        raise DeploymentError("There is no free port on 127.0.0.1 for the SuperLink.") from error


def remembered(places: Places) -> SuperLinkFiles | None:
    """What the SuperLink's process was told last, or None if there was none yet."""
    try:
        return msgspec.json.decode(places.superlink_files.read_bytes(), type=SuperLinkFiles)
    except (OSError, msgspec.DecodeError):
        return None
