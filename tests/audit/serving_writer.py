"""A writer process that serves a socket, integrates and publishes until it is killed.

python -m tests.audit.serving_writer DIRECTORY SOCKET
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.log import LogWriter
from audit.publish import Publisher
from audit.server import LogServer
from audit.witness import LocalSigner
from tests.audit.conftest import ORIGIN
from tests.audit.killing_writer import SEED, say


async def main(directory: str, path: str) -> None:
    signer = LocalSigner(Ed25519PrivateKey.from_private_bytes(SEED))
    with LogWriter.open(Path(directory), origin=ORIGIN) as writer:
        Publisher(writer, signer, interval_s=0.05).start()
        async with LogServer(writer, Path(path), check=len):
            say("ready")
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
