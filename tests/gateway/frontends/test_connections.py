"""Looking for a client's socket among open files must leave the other files alone."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from gateway.frontends.connections import cut

_OTHER_PROCESS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("INSERT INTO seen VALUES (2)")
connection.commit()
connection.close()
"""


def test_a_database_that_is_open_keeps_its_locks_and_goes_on_seeing_others_commits(
    tmp_path: Path,
) -> None:
    # POSIX drops all of a process's locks on a file when any descriptor of it is closed. SQLite
    # would then take another process that closes for the last one, and remove the log that this
    # process goes on reading: an ended session would stay open here for ever.
    path = tmp_path / "directory.sqlite3"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE seen (one INTEGER)")
        connection.execute("INSERT INTO seen VALUES (1)")
        connection.commit()
        cut("127.0.0.1:1", 1)
        for _ in range(2):
            subprocess.run([sys.executable, "-c", _OTHER_PROCESS, str(path)], check=True)
        assert path.with_name(f"{path.name}-wal").exists()
        assert connection.execute("SELECT count(*) FROM seen").fetchone() == (3,)
