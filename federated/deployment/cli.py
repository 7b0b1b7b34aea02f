"""`havengate federated`: up, status, trust, keys, enrol.

The commands only start, ask and print; the program root gives them what they work with. Errors pass
through: the root prints them and chooses the exit code.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.errors import DeploymentError

if TYPE_CHECKING:
    # Help must not wait for Flower.
    from federated.deployment.certificates import Certificates
    from federated.deployment.places import Places

JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLogKeys:
    """What nodes must know of the study log: its origin, and verifier keys (C2SP) as texts."""

    origin: str
    log_keys: Sequence[str]
    witness_keys: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationCommands:
    """How the commands get what they work with.

    `coordinator_key` is the coordinator's public key in hex, made if it is not there yet.
    """

    places: Callable[[], Places]
    certificates: Callable[[], AbstractContextManager[Certificates]]
    log_keys: Callable[[], StudyLogKeys]
    coordinator_key: Callable[[], str]


def build(commands: FederationCommands) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `federated`."""
    app = typer.Typer(
        no_args_is_help=True,
        help="SuperLink and nodes: start them on this machine, enrol nodes, see who is there.",
    )
    _add_up(app, commands)
    _add_status(app, commands)
    _add_trust(app, commands)
    _add_keys(app)
    _add_enrol(app, commands)
    return app


def _add_up(app: typer.Typer, commands: FederationCommands) -> None:
    @app.command()
    def up(
        *,
        nodes: Annotated[int, typer.Option(min=0, max=200, help="Nodes of this machine.")] = 0,
        sites: Annotated[
            bool, typer.Option("--sites", help="Each is a site that speaks for many people.")
        ] = False,
        as_json: JSONOption = False,
    ) -> None:
        """Start the SuperLink and N nodes here, over TLS, and stay until Ctrl-C."""
        from federated.deployment.up import Federation

        def say(line: str) -> None:
            if not as_json:
                typer.echo(line)

        names = [f"node-{number}" for number in range(1, nodes + 1)]
        with (
            commands.certificates() as certificates,
            Federation(commands.places(), certificates, say=say) as federation,
        ):
            signal.signal(signal.SIGTERM, lambda *_: federation.leave())
            roster = federation.enrol(names, site=lambda name: name if sites else "")
            if names:
                federation.start_nodes(names)
            found = {
                "http_port": federation.ports.http,
                "fleet_port": federation.ports.fleet,
                "nodes": names,
                "roster": roster.hash,
            }
            _say(found, "The federation is up. Ctrl-C ends it.", as_json=as_json)
            try:
                federation.keep()
            except KeyboardInterrupt:
                say("ending")


def _add_status(app: typer.Typer, commands: FederationCommands) -> None:
    @app.command()
    def status(*, as_json: JSONOption = False) -> None:
        """Show the nodes on the roster, and which are online."""
        from federated.coordinator import link_access
        from federated.deployment.link import Link
        from federated.deployment.places import read_roster
        from federated.deployment.up import remembered

        places = commands.places()
        files, roster = remembered(places), read_roster(places.roster)
        if files is None:
            raise DeploymentError("No SuperLink was started here yet: havengate federated up")
        online = Link(link_access(places, address=f"{files.host}:{files.http_port}")).online()
        there = {name: id_ in online for name, id_ in roster.flower_ids().items()}
        if as_json:
            typer.echo(json.dumps({"roster": roster.hash, "nodes": there}))
            return
        for name, is_online in there.items():
            site = roster.nodes[name].site
            typer.echo(f"{name}{f' ({site})' if site else ''}: {'on' if is_online else 'off'}line")
        typer.echo(f"{sum(there.values())} of {len(there)} nodes are online.")


def _add_trust(app: typer.Typer, commands: FederationCommands) -> None:
    @app.command()
    def trust(
        *,
        board: Annotated[list[str], typer.Option(help="A member's public key, hex.")],
        site: Annotated[
            list[str] | None, typer.Option(help="NAME=KEY: an officer's public key, hex.")
        ] = None,
        minimum_cohort: Annotated[int, typer.Option(min=3)] = 10,
        as_json: JSONOption = False,
    ) -> None:
        """Write down whose approvals count: for the SuperLink, and for each node's enrolment."""
        import msgspec

        from federated.node.enrolment import Enrolment, parse_enrolment
        from keys.private_files import write_private

        places, log = commands.places(), commands.log_keys()
        places.prepare()
        believed = Enrolment(
            # Each node is given this file with its own name.
            node="federation",
            coordinator=(commands.coordinator_key(),),
            ethics_board=tuple(board),
            sites=_by_site(site or []),
            origin=log.origin,
            log_keys=tuple(log.log_keys),
            witness_keys=tuple(log.witness_keys),
            minimum_cohort=minimum_cohort,
        )
        raw = msgspec.json.format(msgspec.json.encode(believed))
        parse_enrolment(raw)
        write_private(places.federation, raw)
        found = {"file": str(places.federation), "coordinator": believed.coordinator[0]}
        _say(found, f"Written: {places.federation}. Restart what runs.", as_json=as_json)


def _add_keys(app: typer.Typer) -> None:
    @app.command()
    def keys(
        name: Annotated[str, typer.Argument(help="The node's name in studies.")],
        directory: Annotated[Path, typer.Argument(help="Where its keys are kept, mode 0700.")],
    ) -> None:
        """Make the keys of a node that runs elsewhere; print what is enrolled, as JSON."""
        from federated.deployment.places import ensure_node_keys

        made = ensure_node_keys(directory)
        public = {
            "name": name,
            "identity": made.identity_public.hex(),
            "fleet": made.fleet_public.decode("ascii"),
        }
        typer.echo(json.dumps(public))


def _add_enrol(app: typer.Typer, commands: FederationCommands) -> None:
    @app.command()
    def enrol(
        file: Annotated[Path, typer.Argument(help="What `havengate federated keys` printed.")],
        *,
        site: Annotated[str, typer.Option(help="The site, if it speaks for many people.")] = "",
        most_people: Annotated[
            int, typer.Option(min=0, help="For how many, at most; 0 for 100,000.")
        ] = 0,
        as_json: JSONOption = False,
    ) -> None:
        """Put a node that runs elsewhere on the roster. Studies approved before are without it."""
        from federated.coordinator import link_access
        from federated.deployment.link import Link
        from federated.deployment.places import EnrolledNode, add_to_roster
        from federated.deployment.up import remembered

        places = commands.places()
        files = remembered(places)
        if files is None:
            raise DeploymentError("No SuperLink was started here yet: havengate federated up")
        name, identity, fleet = _public_half(file)
        link = Link(link_access(places, address=f"{files.host}:{files.http_port}"))
        node = EnrolledNode(
            identity=identity,
            fleet=fleet,
            flower_id=str(link.enrol(fleet.encode("ascii"), name)),
            site=site,
            most_people=most_people,
        )
        roster = add_to_roster(places.roster, name, node)
        found = {"name": name, "roster": roster.hash}
        _say(found, f"{name} is enrolled; the roster is now {roster.hash}.", as_json=as_json)


def _public_half(file: Path) -> tuple[str, str, str]:
    import msgspec

    class _Public(msgspec.Struct, forbid_unknown_fields=True):
        name: str
        identity: str
        fleet: str

    try:
        public = msgspec.json.decode(file.read_bytes(), type=_Public)
        raw = bytes.fromhex(public.identity)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise DeploymentError(f"{file} is not what a node's keys command prints.") from error
    if len(raw) != 32 or not public.fleet.isascii():  # noqa: PLR2004 - Ed25519
        raise DeploymentError(f"A key in {file} is malformed: ask for it again.")
    return public.name, public.identity, public.fleet


def _by_site(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    sites: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, key = text.partition("=")
        if not equals:
            raise DeploymentError(f"Expected NAME=KEY for a site, got {text[:80]!r}.")
        sites[name] = (*sites.get(name, ()), key)
    return sites


def _say(found: dict[str, Any], line: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(found) if as_json else line)
