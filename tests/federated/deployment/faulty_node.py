"""A node that does what it should until the file `fault` beside its `node.json` says otherwise.

`FAULT STAGE`: at that stage `die`, be `silent`, answer `garbage` or `unsigned` bytes, a vector of
the wrong `shape`, or answer `twice`. Each is done once; the file is gone then.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec

from federated.deployment import nursery
from federated.deployment.fleet import FleetConnection
from federated.deployment.node_files import NodeFiles
from federated.deployment.node_process import access, node_service, open_store
from federated.deployment.places import read_node_keys
from federated.node import agent
from federated.node.agent import RunFacts
from federated.node.service import NodeService
from federated.questions import declared_question
from federated.rounds import sign_reply

_SIGNATURE = 64


class Faulty:
    """A real service, and what the file says."""

    def __init__(self, service: NodeService, directory: Path) -> None:
        self._service = service
        self._directory = directory

    def tidy(self) -> None:
        self._service.tidy()

    def respond(self, facts: RunFacts, stage: str, payload: bytes) -> bytes:
        file = self._directory / "fault"
        fault, at = file.read_text().split() if file.exists() else ("", "")
        if not fault or at != stage:
            return self._service.respond(facts, stage, payload)
        file.unlink()
        if fault == "die":
            (self._directory / "ready").unlink()
            os._exit(9)
        answer = self._service.respond(facts, stage, payload)[_SIGNATURE:]
        if fault == "silent":
            time.sleep(8)
        if fault == "unsigned":
            return os.urandom(_SIGNATURE) + answer
        if fault == "twice":
            _answer_twice()
        if fault == "garbage":
            answer = os.urandom(400)
        if fault == "shape":
            fields = msgspec.msgpack.decode(answer)
            answer = msgspec.msgpack.encode([*fields[:-1], fields[-1][:-8]])
        return sign_reply(
            read_node_keys(self._directory).identity,
            answer, run_id=facts.run_id, stage=stage, request=payload,
        )  # fmt: skip


def _answer_twice() -> None:
    push = FleetConnection.push

    def twice(connection: FleetConnection, reply: object) -> None:
        push(connection, reply)  # type: ignore[arg-type]
        push(connection, reply)  # type: ignore[arg-type]
        FleetConnection.push = push  # type: ignore[method-assign]

    FleetConnection.push = twice  # type: ignore[method-assign, assignment]


def live(arguments: list[str]) -> int:
    file = Path(arguments[0])
    files = msgspec.json.decode(file.read_bytes(), type=NodeFiles)
    store = open_store(files)
    service = node_service(store, files, declared_question)
    (file.parent / "ready").touch()
    agent.serve(access(files), Faulty(service, file.parent))
    return 0


if __name__ == "__main__":
    nursery.import_all()
    nursery.Nursery([Path(sys.argv[1])], live).run()
