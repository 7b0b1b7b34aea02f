"""Where a training is kept between its rounds: one file, closed to others, whole or not at all.

What is in it is noisy sums' weights and canaries' coins: no person's data, but more than was given
out yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from federated.errors import CheckpointError
from keys.errors import KeysError
from keys.private_files import make_private_directory, read_private, write_private

_MAX_BYTES: Final = 256 * 1024 * 1024
_NAMED: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFiles:
    """`training_run.Checkpoints` of one study, in a directory that is made when it is needed."""

    directory: Path
    study_hash: str

    def read(self, query: str) -> bytes | None:
        """As `Checkpoints.read`."""
        path = self._path(query)
        if not path.exists():
            return None
        try:
            return read_private(path, largest_bytes=_MAX_BYTES)
        except (KeysError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read, or not believed: {error}") from error

    def write(self, query: str, data: bytes) -> None:
        """As `Checkpoints.write`."""
        try:
            if not self.directory.exists():
                make_private_directory(self.directory)
            write_private(self._path(query), data)
        except (KeysError, OSError) as error:
            raise CheckpointError(
                f"The training cannot be kept in {self.directory}, so no round is asked: {error}"
            ) from error

    def _path(self, query: str) -> Path:
        # A study that was amended is another one, under the same id.
        return self.directory / f"{self.study_hash[:_NAMED]}-{query}.training"
