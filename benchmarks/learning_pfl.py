"""pfl on the work of `learning_work`, run by `bench_simulation` in a venv of pfl's own."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

from benchmarks import learning_work as work


class Network(torch.nn.Module):
    """The network, with what pfl asks of one."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(work.INPUTS, work.UNITS)
        self.output = torch.nn.Linear(work.UNITS, 1)
        for parameter, value in zip(self.parameters(), work.first_weights(), strict=True):
            parameter.data.copy_(torch.from_numpy(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Before the sigmoid."""
        outputs: torch.Tensor = self.output(torch.tanh(self.hidden(x)))
        return outputs[:, 0]

    def loss(self, x: torch.Tensor, y: torch.Tensor, **_: Any) -> torch.Tensor:
        """Mean log loss."""
        return torch.nn.functional.binary_cross_entropy_with_logits(self(x), y)

    def metrics(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """When each round ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        """Never stop."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


def main(rounds: int) -> None:
    """One round to warm up, then `rounds` that count: clients per second and last weights."""
    torch.set_num_threads(1)
    x, y = (torch.from_numpy(one.astype(np.float32)) for one in work.people(work.COHORT))
    users = [Dataset([x[place], y[place]]) for place in range(work.COHORT)]
    data = FederatedDataset(
        users.__getitem__, get_user_sampler("minimize_reuse", list(range(work.COHORT)))
    )
    network = Network()
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    noise = CentrallyAppliedPrivacyMechanism(GaussianMechanism(work.CLIP, work.MULTIPLIER))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=10**9,
            train_cohort_size=work.COHORT,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[noise]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.RATE, local_batch_size=None
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )
    took = clock.ends[-1] - clock.ends[0]
    weights = torch.cat([one.detach().flatten() for one in network.parameters()])
    print(json.dumps({"rate": rounds * work.COHORT / took, "weights": weights.tolist()}))
