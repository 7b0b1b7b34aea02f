"""Flower's own simulation on the work of `learning_work`, run by `bench_simulation`.

As Flower's guides have it: one virtual client for each device on Ray's backend, FedAvg, clipping
and noise by its own wrapper. Not to be run as a file: Ray's workers import it by its name.
"""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation

from benchmarks import learning_work as work


def network() -> torch.nn.Sequential:
    """The network at its first weights."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(work.INPUTS, work.UNITS), torch.nn.Tanh(), torch.nn.Linear(work.UNITS, 1)
    )
    for parameter, value in zip(layers.parameters(), work.first_weights(), strict=True):
        parameter.data.copy_(torch.from_numpy(value))
    return layers


@cache
def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """Everybody's rows, once for each process."""
    x, y = (torch.from_numpy(one.astype(np.float32)) for one in work.people(work.COHORT))
    return x, y


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One device's epoch."""
    torch.set_num_threads(1)
    x, y = (one[int(context.node_config["partition-id"])] for one in tensors())
    model = network()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=work.RATE)
    optimiser.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": work.ROWS}),
        }
    )
    return Message(content=content, reply_to=message)


def main(rounds: int) -> None:
    """One round to warm up, then `rounds` that count: clients per second and last weights."""
    ends: list[float] = []
    last: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def run(grid: Grid, _: Context) -> None:
        def ended(number: int, arrays: ArrayRecord) -> MetricRecord:
            if number:
                ends.append(time.perf_counter())
            last["weights"] = arrays.to_numpy_ndarrays()
            return MetricRecord()

        inner = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=work.COHORT)
        DifferentialPrivacyServerSideFixedClipping(
            inner,
            noise_multiplier=work.MULTIPLIER,
            clipping_norm=work.CLIP,
            num_sampled_clients=work.COHORT,
        ).start(
            grid=grid,
            initial_arrays=ArrayRecord(network().state_dict()),
            num_rounds=rounds + 1,
            evaluate_fn=ended,
        )

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=work.COHORT,
        backend_name="ray",
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    took = ends[-1] - ends[0]
    weights = np.concatenate([one.ravel() for one in last["weights"]])
    print(json.dumps({"rate": rounds * work.COHORT / took, "weights": weights.tolist()}))
