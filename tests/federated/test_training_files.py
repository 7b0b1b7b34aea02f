"""Where a training is kept: closed to others, whole, and by one run at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from federated.errors import CheckpointError
from federated.training_files import TrainingFiles

STUDY = "ab" * 32


def opened(directory: Path) -> TrainingFiles:
    """What one run has."""
    return TrainingFiles(directory=directory / "reports" / "trainings", study_hash=STUDY)


def test_what_was_written_is_read_by_the_next_run(tmp_path: Path) -> None:
    assert opened(tmp_path).read("mood") is None
    first = opened(tmp_path)
    for data in (b"one", b"two"):
        first.write("mood", data)
        assert opened(tmp_path).read("mood") == data
    assert opened(tmp_path).read("other") is None


def test_file_and_directories_are_closed_to_others(tmp_path: Path) -> None:
    """The directory of reports too, which is made here if a training is what comes first."""
    opened(tmp_path).write("mood", b"weights")
    (file,) = (tmp_path / "reports" / "trainings").iterdir()
    modes = [one.stat().st_mode & 0o777 for one in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]
    file.chmod(0o644)
    with pytest.raises(CheckpointError, match="not believed"):
        opened(tmp_path).read("mood")


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_runs_at_once_the_second_to_write_is_refused_and_writes_nothing(
    tmp_path: Path,
    begun: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if begun:
        opened(tmp_path).write("mood", b"before")
    one, other = opened(tmp_path), opened(tmp_path)
    assert one.read("mood") == other.read("mood")
    one.write("mood", b"round 1 is asked")
    with pytest.raises(CheckpointError, match="Another run"):
        other.write("mood", b"round 1 is asked here")
    one.write("mood", b"round 1 has a sum")
    with pytest.raises(CheckpointError, match="Another run"):
        other.write("mood", b"again")
    assert opened(tmp_path).read("mood") == b"round 1 has a sum"


def test_what_was_taken_away_under_a_run_is_not_put_back(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.write("mood", b"round 1 is asked")
    (file,) = (tmp_path / "reports" / "trainings").iterdir()
    file.unlink()
    with pytest.raises(CheckpointError, match="Another run"):
        run.write("mood", b"round 1 has a sum")
