"""The ServerApp: hands Flower's grid to the coordinator's own conduct of the round.

The coordinator makes it with `server_app` in its own process, where ledger, approvals and log are.
Elsewhere, `app` refuses: a run that somebody else executes has no budget to spend.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

type Conduct = Callable[[Grid, Context], None]


def server_app(conduct: Conduct) -> ServerApp:
    """Return the app around `conduct`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        conduct(grid, context)

    return app


def _refuse(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
    raise RuntimeError("A study's run is executed by its coordinator alone: havengate study run.")


app = server_app(_refuse)
