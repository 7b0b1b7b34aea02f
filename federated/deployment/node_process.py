"""A node's process: its store, its guard, its service, and the agent around them.

Started as `python -m federated.deployment.node_process FILE`, on one machine by
`federated.deployment.up`, on a device by its own service manager. Everything it knows lies on the
device; the file only says where.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from federated.accounting import Accountant
from federated.aggregation.bits import SystemBits
from federated.code_hash import installed_code_hash
from federated.deployment.fleet import FleetAccess
from federated.deployment.node_files import NodeFiles
from federated.deployment.places import read_node_keys
from federated.errors import FederatedError
from federated.manifest import DeclaredQuery, Study
from federated.model import PrivacyCost, Query
from federated.node import agent
from federated.node.budget import Budget
from federated.node.enrolment import enrol, parse_enrolment
from federated.node.guard import Guard, GuardPorts
from federated.node.keeper import keeper_for
from federated.node.service import NodePorts, NodeService
from federated.node.socket import serving
from federated.node.store import Store
from federated.questions import declared_question
from federated.rounds import answer_price
from keys.errors import KeysError

_LOG = structlog.get_logger("federated.node")


def node_service(store: Store, files: NodeFiles, query: Callable[[str], Query]) -> NodeService:
    """Return what answers on this node. `query` reads a query's declaration."""

    def price(study: Study, declared: DeclaredQuery) -> PrivacyCost:  # noqa: ARG001 - the port's
        return answer_price(declared, query(declared.ask))

    def accountant(delta: float, adaptive: bool) -> Accountant:  # noqa: FBT001 - the port's
        return Accountant(delta=delta, adaptive=adaptive)

    def rounds(declared: DeclaredQuery) -> int:
        return query(declared.ask).rounds

    ports = GuardPorts(price=price, rounds=rounds, code_hash=installed_code_hash())
    return NodeService(
        NodePorts(
            store=store,
            guard=Guard(store, Budget(store, accountant), ports),
            identity=read_node_keys(Path(files.directory)).identity,
            query=query,
            random=SystemBits(),
            now=time.time,
            ticks=time.monotonic,
        )
    )


def open_store(files: NodeFiles) -> Store:
    """Open the node's store, and enrol it as the enrolment file says."""
    keeper = keeper_for(Path(files.store), Path(files.key_file) if files.key_file else None)
    store = Store.open(Path(files.store), keeper)
    if files.enrolment:
        enrol(store, parse_enrolment(Path(files.enrolment).read_bytes()))
    return store


def access(files: NodeFiles) -> FleetAccess:
    """Return how this node reaches its SuperLink."""
    return FleetAccess(
        address=files.superlink,
        ca=Path(files.ca_file).read_bytes(),
        key=read_node_keys(Path(files.directory)).fleet,
    )


def _serve_neighbour(path: Path, service: NodeService) -> None:
    """Serve on the socket until SIGTERM or SIGINT."""
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    with serving(path, service):
        ending.wait()


def main(arguments: list[str]) -> int:
    """Serve what the file says; return the exit status."""
    os.umask(0o077)
    try:
        files = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=NodeFiles)
        store = open_store(files)
        try:
            service = node_service(store, files, declared_question)
            if files.socket:
                _serve_neighbour(Path(files.socket), service)
            else:
                agent.serve(access(files), service)
        finally:
            store.close()
    except (OSError, msgspec.DecodeError, FederatedError, KeysError) as error:
        _LOG.error("federated.node.ended", error=str(error))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
