"""`python -m examples.clinic --port 8090 --database PATH [--load]`: serve it, on loopback."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from granian.constants import HTTPModes
from granian.server.embed import Server

from examples.clinic.app import Clinic
from examples.clinic.people import load
from examples.clinic.store import Store


def main() -> None:
    """Load people if asked to, then serve until interrupted."""
    parser = argparse.ArgumentParser(prog="examples.clinic", description="An example clinic.")
    parser.add_argument("--host", default="127.0.0.1", help="nobody signs in: keep others out")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--database", type=Path, default=Path("var/clinic/clinic.sqlite3"))
    parser.add_argument("--load", action="store_true", help="fill the database with people first")
    parser.add_argument("--people", type=int, default=24)
    given = parser.parse_args()
    if given.load:
        load(given.database, given.people)
    with Store(given.database) as store:
        asyncio.run(_serve(Clinic(store), given.host, given.port))


async def _serve(clinic: Clinic, host: str, port: int) -> None:
    server = Server(
        clinic,
        address=host,
        port=port,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    print(f"The clinic is at http://{host}:{port}/", flush=True)
    await server.serve()


if __name__ == "__main__":
    main()
