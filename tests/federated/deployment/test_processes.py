"""No process of a federation outlives the one that started it; those that end are started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from federated.deployment.nursery import PID_FILE
from federated.deployment.processes import ChildProcess, wait_for_port
from federated.errors import DeploymentError
from tests.openbao import wait_until

PROGRAM = "tests.federated.deployment.parents"


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with started("parent", str(tmp_path / "log")) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        wait_until(lambda: gone(pid))


def test_a_child_that_ends_is_started_again_and_stops_when_asked(tmp_path: Path) -> None:
    child = ChildProcess("child", PROGRAM, ["sleep"], log_file=tmp_path / "log")
    child.start()
    try:
        wait_until(lambda: child.pid is not None)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: child.pid not in {None, first})
        second = child.pid
    finally:
        child.stop()
    assert second is not None
    assert gone(second)
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_a_process_that_ended_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = ChildProcess("child", "no.such.module", [], log_file=tmp_path / "log", restart=False)
    child.start()
    try:
        with pytest.raises(DeploymentError, match=r"no\.such|No module"):
            wait_for_port("127.0.0.1", 1, child, timeout_s=60)
    finally:
        child.stop()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir(mode=0o700)
        (tmp_path / name / "node.json").write_text(name)
        made.append(tmp_path / name / "node.json")
    return made


def pid_of(file: Path) -> int:
    found = file.parent / PID_FILE
    return int(found.read_text()) if found.exists() else 0


def test_a_nursery_forks_again_what_ends_and_takes_all_with_it(files: list[Path]) -> None:
    with started("nursery", *map(str, files)) as nursery:
        wait_until(lambda: all(pid_of(file) for file in files))
        first, second = (pid_of(file) for file in files)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: pid_of(files[0]) != first)
        assert pid_of(files[1]) == second
        nursery.send_signal(signal.SIGTERM)
        nursery.wait(60)
        assert all(gone(pid_of(file)) for file in files)


def test_a_nurserys_children_die_with_it_when_it_is_killed(files: list[Path]) -> None:
    with started("nursery", *map(str, files)) as nursery:
        wait_until(lambda: all(pid_of(file) for file in files))
        nursery.kill()
        wait_until(lambda: all(gone(pid_of(file)) for file in files))
