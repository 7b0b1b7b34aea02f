"""One request, end to end, beside nginx and mitmproxy that pass the same bytes and do nothing.

`benchmarks.ingress_gateway` says what the standard exchange is. All three stand before the same app
with TLS in front and plain HTTP behind, and take the same load, by turns: wrk, one thread, 16
connections. Added latency is that of one client alone: at full load latency only repeats the rate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Result
from benchmarks.ingress_gateway import SEARCH, Gateway, start_gateway, verify_exchange
from benchmarks.ingress_load import (
    Measured,
    fetch,
    measure,
    mitmproxy_proxy,
    nginx_proxy,
    write_certificate,
)

ROUNDS = 5
SECONDS = 5
#: Before anything is measured: caches fill, and memory reaches what it stays at.
WARM_UP_S = 10
#: Of the growth of memory: what is kept to a bound (the keys of the last 65,536 entries, so that
#: none is written twice) must have reached it.
GROWTH_REQUESTS = 100_000
GROWTH_AT_MOST_S = 700
NGINX = "nginx, the same bytes through TLS, nothing inspected"
MITMPROXY = "mitmproxy, the same bytes through TLS, nothing inspected"


def run() -> dict[str, Result]:
    """Measure against a gateway, an app and peers that are started for it."""
    with ExitStack() as stack:
        # A socket's path may have 107 bytes: directories of the environment may be longer.
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hgb", dir="/tmp")))
        (home / "gateway").mkdir(mode=0o700)
        gateway = stack.enter_context(start_gateway(home / "gateway"))
        certificate, key = write_certificate(home)
        nginx = stack.enter_context(nginx_proxy(gateway.upstream, certificate, key, home / "nginx"))
        mitmproxy = stack.enter_context(
            mitmproxy_proxy(gateway.upstream, certificate, key, home / "mitmproxy")
        )
        urls = {"ours": gateway.url, NGINX: nginx, MITMPROXY: mitmproxy}
        _verify_peers(gateway, nginx, mitmproxy)

        def load(url: str, seconds: int = SECONDS, connections: int = 16) -> Measured:
            return measure(
                url + SEARCH, gateway.headers, directory=home, seconds=seconds,
                connections=connections,
            )  # fmt: skip

        load(gateway.url, WARM_UP_S)
        busy = {name: [load(url)] for name, url in urls.items()}
        for _ in range(ROUNDS - 1):
            for name, url in urls.items():
                busy[name].append(load(url))
        alone: dict[str, list[Measured]] = {"ours": [], NGINX: []}
        for _ in range(ROUNDS):
            for name, rounds in alone.items():
                rounds.append(load(urls[name], connections=1))
        results = _rates(busy) | _added(alone) | _growth(gateway, load, busy["ours"][-1].per_s)
        verify_exchange(gateway.url, gateway.headers)
        return results


def _verify_peers(gateway: Gateway, *peers: str) -> None:
    """The peers pass on what the app says, byte by byte."""
    said = fetch(gateway.upstream + SEARCH)
    for peer in peers:
        if fetch(peer + SEARCH, gateway.headers) != said:
            raise RuntimeError("expected a peer to pass the app's answer on, got another")


def _rates(busy: dict[str, list[Measured]]) -> dict[str, Result]:
    per_s = {name: [one.per_s for one in rounds] for name, rounds in busy.items()}
    found = {
        "ingress.requests_per_s": Result.of(
            per_s["ours"], unit="1/s", peer=NGINX, peer_rounds=per_s[NGINX]
        )
    }
    for figure, peer in (("ratio_to_nginx", NGINX), ("ratio_to_mitmproxy", MITMPROXY)):
        # Each round beside the peer's round that followed it: the machine's speed drifts.
        ratios = [a / b for a, b in zip(per_s["ours"], per_s[peer], strict=True)]
        found[f"ingress.{figure}"] = Result.of(ratios, unit="times", peer=peer)
    return found


def _added(alone: dict[str, list[Measured]]) -> dict[str, Result]:
    pairs = list(zip(alone["ours"], alone[NGINX], strict=True))
    return {
        "ingress.added_p50_ms": Result.of(
            [ours.p50_ms - peer.p50_ms for ours, peer in pairs],
            unit="ms", peer=f"latency of {NGINX}", peer_rounds=[peer.p50_ms for _, peer in pairs],
        ),
        "ingress.added_p99_ms": Result.of(
            [ours.p99_ms - peer.p99_ms for ours, peer in pairs],
            unit="ms", peer=f"latency of {NGINX}", peer_rounds=[peer.p99_ms for _, peer in pairs],
        ),
    }  # fmt: skip


def _growth(
    gateway: Gateway, load: Callable[[str, int], Measured], per_s: float
) -> dict[str, Result]:
    """Calls of the key server and memory over many requests of a gateway that is warm."""
    (calls, checkpoints), resident = gateway.vault_calls(), gateway.resident_bytes()
    seconds = min(GROWTH_AT_MOST_S, max(1, round(GROWTH_REQUESTS / per_s)))
    measured = load(gateway.url, seconds)
    grown_mb = (gateway.resident_bytes() - resident) / 1e6
    calls_after, checkpoints_after = gateway.vault_calls()
    return {
        "gateway.vault_calls_per_1000_requests": Result.of(
            [(calls_after - calls) * 1_000 / measured.requests],
            unit="calls",
            peer="signatures of checkpoints in the same time, one a second",
            peer_rounds=[(checkpoints_after - checkpoints) * 1_000 / measured.requests],
        ),
        "ingress.rss_growth_mb_per_100000": Result.of(
            [grown_mb * 100_000 / measured.requests], unit="MB"
        ),
    }
