"""The coordinator's side of the SuperLink: enrol nodes, start an approved run, execute it.

Mutual TLS with the coordinator's certificate on every call; the gate's secret on control calls;
Flower's signed executor requests for claiming a run, and its task token after that. The run is
executed in this process: there is no `flower-superexec` and no cold start.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx

from federated.app.bundle import installed_bundle
from federated.app.server_app import Conduct, server_app
from federated.deployment.gate import STUDY_HEADER, RunConfiguration
from federated.deployment.headers import ExecutorSignature, Headers, version_headers
from federated.errors import DeploymentError

if TYPE_CHECKING:
    from flwr.supercore.runtime import RuntimeHttpClient

_TIMEOUT_S: Final = 10.0
_CLAIM: Final = (
    "/flwr.proto.Runtime/PullPendingTasks",
    "/flwr.proto.Runtime/ClaimTask",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAccess:
    """What the coordinator needs to reach a SuperLink. Files are PEM; secrets are raw bytes."""

    address: str
    certificate_file: Path
    key_file: Path
    ca_file: Path
    control_secret_file: Path
    executor_secret_file: Path

    def tls(self) -> ssl.SSLContext:
        """A context that shows the coordinator's certificate and trusts our authority alone."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


class Link:
    """One SuperLink. Every method raises `DeploymentError` if it refuses or cannot be reached."""

    def __init__(self, access: LinkAccess) -> None:
        self._access = access
        self._secret = access.control_secret_file.read_bytes().hex()

    def enrol(self, public_key: bytes, name: str) -> int:
        """Register a node's ECDSA public key (PEM); return Flower's id for it, old or new."""
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest

        with self._control() as client:
            for known in client.ListNodes(ListNodesRequest()).nodes_info:
                if known.public_key == public_key:
                    return int(known.node_id)
            request = RegisterNodeRequest(public_key=public_key, name=name)
            return int(client.RegisterNode(request).node_id)

    def expel(self, node_id: int) -> None:
        """Take a node off the register: its key opens nothing any more."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._control() as client:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def online(self) -> set[int]:
        """Ids of the nodes whose heartbeat is recent."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._control() as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        return {int(node.node_id) for node in nodes if node.status == "online"}

    def start(self, evidence: bytes, configuration: RunConfiguration) -> int:
        """Start a run of the installed app for an approved study; return its id."""
        from flwr.common.serde import user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        bundle = installed_bundle()
        request = StartRunRequest(
            fab=Fab(hash_str=bundle.hash, content=bundle.content),
            override_config=user_config_to_proto(dict(configuration)),
        )
        header = {STUDY_HEADER.decode(): base64.b64encode(evidence).decode()}
        with self._control(header) as client:
            run_id = int(client.StartRun(request).run_id)
        if run_id == 0:
            raise DeploymentError("The SuperLink did not start the run; see its log.")
        return run_id

    def execute(self, run_id: int, conduct: Conduct) -> None:
        """Claim the run and conduct it here; tell the SuperLink how it ended.

        Raises what `conduct` raises.
        """
        from flwr.app import Context, RecordDict
        from flwr.common.constant import SubStatus
        from flwr.common.serde import context_from_proto, run_from_proto
        from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
        from flwr.supercore.heartbeat import HeartbeatSender
        from flwr.supercore.task_identity import TaskIdentity

        from federated.deployment.grid import RuntimeGrid

        token = self._claim(run_id)
        grid = RuntimeGrid(self._access.address, tls=self._access.tls(), token=token)
        with _translated():
            given = grid.client.PullTaskInput(PullTaskInputRequest())
        grid.set_run(run_from_proto(given.run))
        found = context_from_proto(given.context)
        context = Context(
            run_id=run_id,
            node_id=found.node_id,
            node_config={},
            state=RecordDict(),
            run_config=dict(run_from_proto(given.run).override_config),
        )
        # Flower's messages take the run's id from the process: one run at a time.
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run_id
        TaskIdentity.node_id = found.node_id
        heartbeat = HeartbeatSender(task_heartbeat(grid.client))
        heartbeat.start()
        status, details = SubStatus.FAILED, "The coordinator did not finish the round."
        try:
            server_app(conduct)(grid, context)
            status, details = SubStatus.COMPLETED, ""
        finally:
            heartbeat.stop()
            output = PushTaskOutputRequest(sub_status=status, details=details)
            # If it is away: it notices by itself when heartbeats stay away.
            with suppress(httpx.HTTPError, OSError, ValueError):
                grid.client.PushTaskOutput(output)
            grid.close()

    def _claim(self, run_id: int) -> str:
        from flwr.proto.runtime_pb2 import ClaimTaskRequest, PullPendingTasksRequest
        from flwr.supercore.runtime import RuntimeHttpClient

        client = RuntimeHttpClient(
            f"https://{self._access.address}",
            interceptors=[
                Headers(version_headers("flwr-serverapp")),
                ExecutorSignature(self._access.executor_secret_file.read_bytes(), _CLAIM),
            ],
            verify=self._access.tls(),
            timeout=_TIMEOUT_S,
        )
        with client, _translated():
            for task in client.PullPendingTasks(PullPendingTasksRequest()).tasks:
                if task.run_id == run_id:
                    token = client.ClaimTask(ClaimTaskRequest(task_id=task.task_id)).token
                    if token:
                        return str(token)
        raise DeploymentError("The run that was just started is not there, or somebody has it.")

    @contextmanager
    def _control(self, headers: Mapping[str, str] | None = None) -> Iterator[_Control]:
        from flwr.supercore.control import ControlHttpClient

        proofs = {
            **version_headers("flwr CLI"),
            "authorization": f"Bearer {self._secret}",
            **(headers or {}),
        }
        client = ControlHttpClient(
            f"https://{self._access.address}",
            interceptors=[Headers(proofs)],
            verify=self._access.tls(),
            timeout=_TIMEOUT_S,
        )
        with client, _translated():
            yield client


def task_heartbeat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Return what says that the run goes on; False, to be tried again, if that was not heard.

    Flower's own ends its thread, or sends this process SIGINT, where the SuperLink does not know
    the run any more, after it was away for a minute: answers that were paid for went with it. Here
    a round then comes to nothing by itself, at its deadline.
    """
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    def beat() -> bool:
        try:
            return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except (httpx.HTTPError, OSError, ValueError):
            return False

    return beat


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise DeploymentError(
            f"The SuperLink refused ({error.response.status_code}): {error.response.text[:300]}"
        ) from error
    except (httpx.HTTPError, ssl.SSLError, OSError) as error:
        raise DeploymentError(
            f"The SuperLink cannot be reached ({type(error).__name__}): is havengate federated up "
            "running?"
        ) from error


if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient as _Control
