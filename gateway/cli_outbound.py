"""`havengate outbound`: keys of apps that call out.

A key is printed once; only its digest is kept, in a file beside the configuration. Nothing that is
running changes: an app may call out once the lines that are printed stand in the configuration and
the gateway was started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.errors import GatewayConfigurationError

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from gateway.settings import OutboundSettings

NameArgument = Annotated[str, typer.Argument(help="The app: lower-case letters, digits, hyphens.")]
JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def build(settings: Callable[[], OutboundSettings], config_file: Callable[[], Path]) -> typer.Typer:
    """Return the sub-command. `settings` reads the section, `config_file` says where from."""
    app = typer.Typer(no_args_is_help=True, help="Apps that call out through the gateway.")

    @app.callback()
    def _outbound() -> None:
        """Keep `add` a command of its own."""

    @app.command()
    def add(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Make a key for an app that calls out. It is shown once."""
        section = settings()
        made = make_key(name, section, config_file().parent)
        if as_json:
            typer.echo(json.dumps(made))
            return
        typer.echo(f"Key of {name}, shown this once:\n  {made['key']}\n")
        typer.echo(f"Its digest is in {made['key_hash_file']}. Add to the configuration:\n")
        typer.echo(made["configuration"])
        typer.echo("Start the gateway again, then give the app:\n")
        typer.echo(f"  HTTPS_PROXY={made['proxy']}")
        typer.echo(f"  the authority to trust: {made['ca_file']}")

    return app


def make_key(name: str, section: OutboundSettings, directory: Path) -> dict[str, str]:
    """Make a key, keep its digest in `directory`, and return what is to be said about it.

    Raises `GatewayConfigurationError` for a name that cannot stand in the log or has a key already.
    """
    from gateway.outbound.apps import AUTHORITY_FILE, hash_key, is_name, new_key
    from keys.private_files import write_private

    if not is_name(name):
        raise GatewayConfigurationError(
            f"Expected a name of lower-case letters, digits and hyphens, got {name!r}; choose "
            "another one."
        )
    path = directory / f"outbound-{name}.key"
    if path.exists() or name in {app.name for app in section.apps}:
        raise GatewayConfigurationError(
            f"{name} has a key already; for a new one remove {path}, and its lines from the "
            "configuration."
        )
    key = new_key()
    write_private(path, hash_key(key).encode("ascii"))
    return {
        "name": name,
        "key": key,
        "key_hash_file": str(path),
        "proxy": f"http://{name}:{key}@{section.host}:{section.port}",
        "ca_file": str(Path(section.directory) / AUTHORITY_FILE),
        "configuration": _lines(name, path.name),
    }


def _lines(name: str, file: str) -> str:
    return f"""\
[[gateway.outbound.apps]]
name = "{name}"
key_hash_file = "{file}"
purpose = "TREAT"

[[gateway.outbound.destinations]]
host = "api.example.org"
purposes = ["TREAT"]
apps = ["{name}"]
"""
