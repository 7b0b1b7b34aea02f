"""Flower's own SuperNode at a clinic: it works, and holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from flwr.app import Context
from flwr.serverapp import Grid

from federated.deployment.grid import GridExchange
from federated.deployment.node_files import NodeFiles
from federated.deployment.processes import QUIET, ChildProcess
from federated.node.contact import Question
from federated.node.socket import VARIABLE
from federated.rounds import GREET, Greeting, open_reply, parse
from federated.study_run import Patience
from keys.openbao_process import free_port
from keys.private_files import write_private
from tests.federated.deployment.federation import PEOPLE, Running
from tests.openbao import wait_until

NODE = "node-5"


@contextmanager
def stock(federation: Running, directory: Path) -> Iterator[Path]:
    """Put Flower's SuperNode, and the service behind a socket, in the place of a node's agent."""
    place = federation.places.node(NODE)
    os.kill(federation.federation.node_pid(NODE), signal.SIGSTOP)
    files = msgspec.json.decode((place / "node.json").read_bytes(), type=NodeFiles)
    path = directory / "node.socket"
    own = msgspec.structs.replace(files, socket=str(path))
    write_private(directory / "service.json", msgspec.json.encode(own))
    service = ChildProcess(
        "service",
        "federated.deployment.node_process",
        [str(directory / "service.json")],
        log_file=directory / "service.log",
    )
    service.start()
    supernode = None
    log = (directory / "supernode.log").open("wb")
    try:
        wait_until(path.exists)
        supernode = subprocess.Popen(
            [
                Path(sys.executable).with_name("flower-supernode"),
                *("--superlink", files.superlink, "--root-certificates", files.ca_file),
                *("--auth-supernode-private-key", place / "fleet.pem"),
                *("--port", str(free_port(None)), "--isolation", "subprocess"),
            ],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                **QUIET,
                VARIABLE: str(path),
                "FLWR_HOME": str(directory / "flwr"),
                "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            },
            start_new_session=True,
        )
        yield directory / "supernode.log"
    finally:
        if supernode is not None:
            os.killpg(supernode.pid, signal.SIGKILL)
            supernode.wait()
        log.close()
        service.stop()
        os.kill(federation.federation.node_pid(NODE), signal.SIGCONT)


def test_flowers_supernode_hands_messages_to_the_service_behind_the_socket(
    federation: Running, tmp_path: Path
) -> None:
    """One stage: a whole round takes a cold process for each of six, and minutes."""
    federation.wait_whole()
    signed = federation.approved()
    node, link = federation.roster.flower_ids()[NODE], federation.federation.link
    patience = Patience(timeout_s=180.0, enough=1, stragglers_s=0.0)
    answers: dict[int, bytes] = {}
    with stock(federation, tmp_path) as log:
        wait_until(lambda: b"SuperNode ID" in log.read_bytes(), timeout_s=120)
        run_id = link.start(signed.encode(), signed.study.run_configuration())

        question = Question(
            study=signed.encode(),
            query="hours",
            run=str(run_id),
            round_number=0,
            roster=federation.roster.keys(),
            sites=federation.roster.sites(),
        ).encode()

        def conduct(grid: Grid, context: Context) -> None:
            answers.update(GridExchange(grid).ask(GREET, {node: question}, patience))

        link.execute(run_id, conduct)
    key = federation.roster.keys()[NODE]
    payload = open_reply(key, answers[node], run_id=run_id, stage=GREET, request=question)
    assert parse(Greeting, payload).people == len(PEOPLE)
