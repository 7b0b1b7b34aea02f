"""Two processes never write one state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from federated.deployment.superlink import only_one
from federated.errors import DeploymentError

HOLDER = """
import sys, time
from pathlib import Path
from federated.deployment.superlink import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_superlink_does_not_open_the_state_of_the_first(tmp_path: Path) -> None:
    database = tmp_path / "state.sqlite3"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(database)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DeploymentError, match="Another SuperLink"), only_one(database):
            pytest.fail("two have it")
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        # Whatever ended the first.
        with only_one(database):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
