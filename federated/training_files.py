"""Where a training is kept between its rounds: one file, closed to others, whole or not at all.

What is in it is noisy sums' weights and canaries' coins: no person's data, but more than was given
out yet. Two runs that went on with one training at once would take its rounds from each other: who
finds that the file is not as they left it writes nothing, and so asks nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

from federated.errors import CheckpointError
from keys.errors import KeysError
from keys.private_files import make_private_directory, read_private, write_private

_MAX_BYTES: Final = 256 * 1024 * 1024
_NAMED: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFiles:
    """`training_run.Checkpoints` of one study and one run.

    The directory is made when it is needed.
    """

    directory: Path
    study_hash: str
    #: By training, the hash of what was read or written last; empty for nothing.
    _left: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, query: str) -> bytes | None:
        """As `Checkpoints.read`."""
        data = self._there(query)
        self._left[query] = _hash(data)
        return data

    def write(self, query: str, data: bytes) -> None:
        """As `Checkpoints.write`. Raises `CheckpointError` also if another run wrote meanwhile."""
        left = self._left.get(query)
        if left is not None and _hash(self._there(query)) != left:
            raise CheckpointError(
                f"Another run goes on with the training {query}, so this one asks nobody any more: "
                "let that one end."
            )
        try:
            for directory in (self.directory.parent, self.directory):
                if not directory.exists():
                    make_private_directory(directory)
            write_private(self._path(query), data)
        except (KeysError, OSError) as error:
            raise CheckpointError(
                f"The training cannot be kept in {self.directory}, so no round is asked: {error}"
            ) from error

        self._left[query] = _hash(data)

    def _there(self, query: str) -> bytes | None:
        path = self._path(query)
        if not path.exists():
            return None
        try:
            return read_private(path, largest_bytes=_MAX_BYTES)
        except (KeysError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read, or not believed: {error}") from error

    def _path(self, query: str) -> Path:
        # A study that was amended is another one, under the same id.
        return self.directory / f"{self.study_hash[:_NAMED]}-{query}.training"


def _hash(data: bytes | None) -> str:
    return "" if data is None else sha256(data).hexdigest()
