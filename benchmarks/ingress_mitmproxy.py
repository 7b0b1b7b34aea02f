"""Peer of the ingress benchmark: mitmproxy in reverse mode, passing bytes on and doing nothing.

ingress_mitmproxy.py PORT UPSTREAM PEM HOME
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from mitmproxy import options
from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig
from mitmproxy.master import Master


async def serve(port: int, upstream: str, pem: str, home: str) -> None:
    """Serve until told to end."""
    given = options.Options(
        listen_host="127.0.0.1", listen_port=port, mode=[f"reverse:{upstream}"], confdir=home
    )
    master = Master(given)
    needed: list[Any] = [
        core.Core(),
        proxyserver.Proxyserver(),  # type: ignore[no-untyped-call]
        next_layer.NextLayer(),
        tlsconfig.TlsConfig(),
    ]
    master.addons.add(*needed)  # type: ignore[no-untyped-call]
    # Known only once the addons are there. A streamed body is passed on as it comes.
    given.update(certs=[f"*={pem}"], stream_large_bodies="1")  # type: ignore[no-untyped-call]
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, master.shutdown)
    await master.run()


if __name__ == "__main__":
    _, port_given, *rest = sys.argv
    asyncio.run(serve(int(port_given), *rest))
