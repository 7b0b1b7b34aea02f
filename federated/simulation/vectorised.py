"""One round of training on many virtual devices at once, in bounded memory, on CPU or one GPU.

Gives what `learning.local.update` gives for each person alone, to floating tolerance, and then the
sum that secure aggregation would give: clipped as `aggregation.encoding.clip` does, or, `exact`, as
the integers that each device would send. Noise is not added here (`training`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.encoding import Rounding
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery
from federated.learning.spec import TrainSpec
from federated.model import RandomBits
from federated.simulation.devices import Devices
from federated.simulation.kernels import Chunk, changes

#: On a CPU smaller chunks cost more calls, larger ones leave the caches. A GPU wants gigabytes.
_MEMORY_BYTES: Final = 32 << 20

type _Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSum:
    """What the people of one round add up to, without noise.

    `total`: shape (parameters,), in the integers of `TrainQuery.rounding`: whole numbers if the
    round was exact, else what these are on average. `people` took part, `silent` of them with
    zeros; `clipped` had an update longer than the clip. Only `total` and `people` would be known in
    a study.
    """

    total: NDArray[np.int64] | NDArray[np.float64] = field(repr=False)
    people: int
    silent: int
    clipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectorised:
    """How a round is reckoned.

    `memory_bytes`: what all work in progress may take, beside the examples themselves and one row
    of parameters for each worker. `device`: `cpu`, or what torch calls a GPU, to which the examples
    are then copied once a round. `workers`: threads on the CPU, as many as it has cores if 0; the
    sum does not depend on them.
    """

    memory_bytes: int = _MEMORY_BYTES
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that leave no room."""
        if self.memory_bytes < 1 or self.workers < 0:
            raise ValueError("expected some memory and no negative number of workers")

    def updates(
        self, spec: TrainSpec, weights: _Floats, devices: Devices, asked: NDArray[np.int64]
    ) -> _Floats:
        """Each asked person's change of the weights, unclipped: (asked, parameters).

        Zeros exactly where `learning.local.update` gives them. Raises ValueError if not even one
        device's work fits the memory.
        """
        found = np.zeros((len(asked), parameters(spec)))
        for places, chunk in self._chunks(spec, weights, devices, asked, lambda own: own):
            found[places] = chunk
        return found

    def round_sum(
        self, spec: TrainSpec, weights: _Floats, devices: Devices, asked: NDArray[np.int64]
    ) -> RoundSum:
        """The clipped updates' sum, unrounded. Who is asked twice counts twice."""
        clip_norm, size = spec.clip, parameters(spec)

        def summed(updates: _Floats) -> tuple[_Floats, int, int]:
            within, clipped = clip_all(updates, norm=clip_norm)
            return within.sum(axis=0), clipped, int(within.any(axis=1).sum())

        total, clipped, spoke = np.zeros(size), 0, 0
        for _, (part, long, some) in self._chunks(spec, weights, devices, asked, summed):
            total, clipped, spoke = total + part, clipped + long, spoke + some
        return RoundSum(
            total=total * spec.scale,
            people=len(asked),
            silent=len(asked) - spoke,
            clipped=clipped,
        )

    def exact_sum(
        self,
        spec: TrainSpec,
        weights: _Floats,
        devices: Devices,
        asked: NDArray[np.int64],
        random: RandomBits,
    ) -> RoundSum:
        """The sum of the very integers that devices send: each update through `Rounding.encode`.

        With the bits of `TrainRound.encode` for the same people one by one, in that order.
        """
        rounding = TrainQuery(spec=spec).rounding
        total, clipped, spoke = np.zeros(rounding.dimension, dtype=np.int64), 0, 0
        step = max(1, self.memory_bytes // (8 * rounding.dimension))
        for start in range(0, len(asked), step):
            updates = self.updates(spec, weights, devices, asked[start : start + step])
            clipped += clip_all(updates, norm=spec.clip)[1]
            some = updates.any(axis=1)
            spoke += int(some.sum())
            total += _encoded(rounding, updates[some], random)
        return RoundSum(total=total, people=len(asked), silent=len(asked) - spoke, clipped=clipped)

    def _chunks[T](
        self,
        spec: TrainSpec,
        weights: _Floats,
        devices: Devices,
        asked: NDArray[np.int64],
        then: Callable[[_Floats], T],
    ) -> Iterator[tuple[NDArray[np.intp], T]]:
        """Places in `asked`, and `then` of their updates; people without an update are left out."""
        start = np.asarray(weights, dtype=np.float64)
        if start.shape != (parameters(spec),) or not np.isfinite(start).all():
            return
        loaded = _Loaded.of(spec, devices, self.device)
        plan = list(self._plan(spec, devices, asked))

        def work(places: NDArray[np.intp]) -> tuple[NDArray[np.intp], T]:
            return places, then(loaded.updates(spec, start, asked[places]))

        if self.device != "cpu":
            yield from map(work, plan)
            return
        with (
            loaded.kept_threads(),
            ThreadPoolExecutor(self._workers, initializer=loaded.alone) as pool,
        ):
            # In the order of the plan, whoever is ready first: sums are the same on every run.
            yield from pool.map(work, plan)

    @property
    def _workers(self) -> int:
        if self.device != "cpu":
            return 1
        return self.workers or os.cpu_count() or 1

    def _plan(
        self, spec: TrainSpec, devices: Devices, asked: NDArray[np.int64]
    ) -> Iterator[NDArray[np.intp]]:
        """Places in `asked` that go together, most examples first, so that little is padded."""
        counts = devices.counts[asked]
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        room, start = self.memory_bytes // self._workers, 0
        # So that every worker has something to do.
        most = -(-len(order) // self._workers)
        while start < len(order):
            size = int(counts[order[start]]) * _example_bytes(spec, devices.x.itemsize)
            fits = room // (size + 4 * 8 * parameters(spec))
            if not fits:
                raise ValueError(
                    f"{spec.name}: one device's work takes {size} bytes, and each of "
                    f"{self._workers} workers has {room}: allow more memory or fewer workers."
                )
            yield order[start : start + min(fits, most)]
            start += min(fits, most)


def clip_all(updates: _Floats, *, norm: float) -> tuple[_Floats, int]:
    """`aggregation.encoding.clip` in L2 for each row, and how many rows it made shorter."""
    finite = np.where(np.isfinite(updates), updates, 0.0)
    largest = np.max(np.abs(finite), axis=1, initial=0.0)
    some = largest > 0
    divisor = np.where(some, largest, 1.0)
    # Scaled first, so that squares of huge numbers do not overflow.
    scaled = finite / divisor[:, None]
    length = np.sqrt(np.einsum("pd,pd->p", scaled, scaled))
    with np.errstate(over="ignore"):
        long = some & (length > norm / divisor)
    factor = norm / np.where(long, length, 1.0)
    return np.where(long[:, None], scaled * factor[:, None], finite), int(long.sum())


def _encoded(rounding: Rounding, updates: _Floats, random: RandomBits) -> NDArray[np.int64]:
    total = np.zeros(rounding.dimension, dtype=np.int64)
    for one in updates:
        total += rounding.encode(one, random)
    return total


def _example_bytes(spec: TrainSpec, item: int) -> int:
    """What one example takes while its gradient is reckoned, generously."""
    if spec.kind == "gru":
        # Autograd keeps every gate of every step.
        return item * spec.steps * (2 * spec.inputs + 24 * spec.hidden[0])
    return item * (2 * spec.inputs + 3 * sum(spec.hidden) + 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """Devices where the work is done: NumPy arrays, or tensors on the CPU or a GPU."""

    library: Any
    x: Any
    y: Any
    devices: Devices

    @classmethod
    def of(cls, spec: TrainSpec, devices: Devices, device: str) -> _Loaded:
        if device == "cpu" and spec.kind in {"logistic", "linear"}:
            return cls(library=np, x=devices.x, y=devices.y, devices=devices)
        import torch

        x, y = (torch.from_numpy(_writable(one)).to(device) for one in (devices.x, devices.y))
        return cls(library=torch, x=x, y=y, devices=devices)

    def updates(self, spec: TrainSpec, start: _Floats, people: NDArray[np.int64]) -> _Floats:
        """(people, parameters), zeros where they are not finite. Each has an example."""
        with np.errstate(all="ignore"):
            begin = start.astype(self.devices.x.dtype)
        if self.library is np:
            with np.errstate(all="ignore"):
                found = changes(spec, begin, self._chunk(people))
        else:
            with self.library.no_grad():
                tensor = self.library.asarray(begin, device=self.x.device)
                found = changes(spec, tensor, self._chunk(people)).cpu().numpy()
        wide = np.asarray(found, dtype=np.float64)
        finite = np.isfinite(wide).all(axis=1)
        return wide if finite.all() else np.where(finite[:, None], wide, 0.0)

    def _chunk(self, people: NDArray[np.int64]) -> Chunk:
        starts, counts = self.devices.starts[people], self.devices.counts[people]
        most = int(counts[0])
        shape, rest = (len(people), most), tuple(self.x.shape[1:])
        there = np.arange(most) < counts[:, None]
        share = (there / counts[:, None]).astype(self.devices.x.dtype)
        if (np.diff(starts) == most).all() and there.all():
            # People who lie one after the other need no copy.
            own = slice(int(starts[0]), int(starts[0]) + len(people) * most)
            x, y = self.x[own].reshape(*shape, *rest), self.y[own].reshape(shape)
        else:
            index = self._there((starts[:, None] + np.where(there, np.arange(most), 0)).ravel())
            x, y = self.x[index].reshape(*shape, *rest), self.y[index].reshape(shape)
        return Chunk(library=self.library, x=x, y=y, share=self._there(share))

    def _there(self, array: NDArray[Any]) -> Any:
        return array if self.library is np else self.library.from_numpy(array).to(self.x.device)

    def alone(self) -> None:
        """In each worker: other workers do what torch's own threads would, and wait less."""
        if self.library is not np:
            self.library.set_num_threads(1)

    @contextmanager
    def kept_threads(self) -> Iterator[None]:
        """Put torch's number of threads back when all workers are done."""
        before = None if self.library is np else self.library.get_num_threads()
        try:
            yield
        finally:
            if before is not None:
                self.library.set_num_threads(before)


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself where torch may have it: it warns of arrays that nobody may write to."""
    return array if array.flags.writeable else array.copy()
