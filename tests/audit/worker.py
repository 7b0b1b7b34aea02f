"""A worker process that hands entries to a writer's socket until it is done, or killed.

    python -m tests.audit.worker SOCKET FIRST COUNT RETRIES

Prints `<number> <index>` for each entry that it was told is sequenced. With retries it hands in
again, under the same key, what it got no answer for, until a writer is back.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from audit.errors import LogUnavailableError
from audit.transport import LogClient
from tests.audit.conftest import entry

_TOGETHER = 32


async def work(path: str, first: int, count: int, retries: int) -> None:
    numbers = iter(range(first, first + count))
    async with LogClient(Path(path)) as client:

        async def lane() -> None:
            for number in numbers:
                key = os.urandom(16)
                for attempt in range(retries + 1):
                    try:
                        place = await client.append_async(entry(number), key=key)
                    except LogUnavailableError:
                        if attempt == retries:
                            raise
                        await asyncio.sleep(0.02)
                    else:
                        os.write(1, f"{number} {place.index}\n".encode())
                        break

        await asyncio.gather(*(lane() for _ in range(_TOGETHER)))


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], *map(int, sys.argv[2:])))
