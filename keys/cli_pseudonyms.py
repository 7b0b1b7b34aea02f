"""`havengate keys officer | pseudonym | reidentify`: pseudonyms, and the two persons who undo them.

An officer is a person with a login of their own at the key server, which opens one half of every
pseudonym. Nobody gets both. The officer names the directory that holds that login; it may lie on a
stick. Before: `keys.cli`. After: `keys.pseudonyms`, `keys.bootstrap`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from keys.pseudonyms import Half, Officer, Pseudonymiser
    from keys.settings import RoleSettings

JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NameOption = Annotated[str, typer.Option("--officer", help="Your name as an officer.")]
LoginOption = Annotated[
    Path, typer.Option("--login", help="Directory with your login, from `havengate keys officer`.")
]


class HalfName(StrEnum):
    """Which half of a pseudonym somebody may open."""

    first = "first"
    second = "second"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPseudonyms:
    """What the commands work with. `login` opens an officer's own connection to the key server."""

    tenant: str
    pseudonymiser: Pseudonymiser
    login: Callable[[str, Path], AbstractContextManager[Officer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudonymCommands:
    """How the commands get what they work with.

    `make_officer` makes a login as the key server's administrator; `open_pseudonyms` opens
    everything else, the log included.
    """

    make_officer: Callable[[str, Half, Path], RoleSettings]
    open_pseudonyms: Callable[[], AbstractContextManager[OpenPseudonyms]]


def add(app: typer.Typer, commands: PseudonymCommands) -> None:
    """Add the commands to `havengate keys`."""
    _add_officer(app, commands)
    _add_pseudonym(app, commands)
    steps = typer.Typer(no_args_is_help=True, help="Learn who is behind a pseudonym: two officers.")
    _add_request(steps, commands)
    _add_approve(steps, commands)
    _add_reveal(steps, commands)
    app.add_typer(steps, name="reidentify")


def _add_officer(app: typer.Typer, commands: PseudonymCommands) -> None:
    @app.command()
    def officer(
        name: Annotated[str, typer.Argument(help="Lower-case letters, digits, hyphens.")],
        login: Annotated[Path, typer.Argument(help="Directory in which to leave the login.")],
        *,
        half: Annotated[HalfName, typer.Option(help="The half that this person may open.")],
        as_json: JSONOption = False,
    ) -> None:
        """Give one person a login that opens one half of pseudonyms. Nobody gets both halves.

        With a key server of your own it takes an administrator's token from VAULT_TOKEN.
        """
        files = commands.make_officer(name, half.value, login)
        if as_json:
            found = {"role_id_file": files.role_id_file, "secret_id_file": files.secret_id_file}
            typer.echo(json.dumps({"officer": name, "half": half.value, **found}))
            return
        typer.echo(f"{name} may open the {half.value} half. Hand over, and then delete here:")
        typer.echo(f"  {files.role_id_file}\n  {files.secret_id_file}")


def _add_pseudonym(app: typer.Typer, commands: PseudonymCommands) -> None:
    @app.command()
    def pseudonym(
        person: Annotated[str, typer.Argument(help="As the apps name the person: Patient/123.")],
        *,
        purpose: Annotated[str, typer.Option(help="Another purpose gives another pseudonym.")],
        tenant: Annotated[str | None, typer.Option(help="Default: the configured one.")] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Print the pseudonym of a person for a purpose."""
        with commands.open_pseudonyms() as opened:
            made = opened.pseudonymiser.pseudonym(
                tenant=tenant or opened.tenant, purpose=purpose, person=person
            )
        typer.echo(json.dumps({"pseudonym": made}) if as_json else made)


def _add_request(app: typer.Typer, commands: PseudonymCommands) -> None:
    @app.command()
    def request(
        pseudonym: Annotated[str, typer.Argument(help="hgp1.…")],
        *,
        officer: NameOption,
        login: LoginOption,
        reason: Annotated[str, typer.Option(help="A code, such as patient-safety. Logged.")],
        tenant: Annotated[str | None, typer.Option(help="Default: the configured one.")] = None,
        as_json: JSONOption = False,
    ) -> None:
        """First officer: ask to learn who this is. Good for 15 minutes."""
        with commands.open_pseudonyms() as opened, opened.login(officer, login) as asking:
            request_id = opened.pseudonymiser.request(
                asking, tenant=tenant or opened.tenant, pseudonym=pseudonym, reason=reason
            )
        if as_json:
            typer.echo(json.dumps({"request": request_id}))
            return
        typer.echo(f"Request {request_id}. Now an officer of the second half, within 15 minutes:")
        typer.echo(f"  havengate keys reidentify approve {request_id} --officer … --login …")


def _add_approve(app: typer.Typer, commands: PseudonymCommands) -> None:
    @app.command()
    def approve(
        request_id: Annotated[str, typer.Argument(metavar="REQUEST")],
        *,
        officer: NameOption,
        login: LoginOption,
        tenant: Annotated[str | None, typer.Option(help="Default: the configured one.")] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Second officer, another person: open your half for the one who asked."""
        with commands.open_pseudonyms() as opened, opened.login(officer, login) as approving:
            opened.pseudonymiser.approve(
                approving, tenant=tenant or opened.tenant, request_id=request_id
            )
        typer.echo(json.dumps({"approved": request_id}) if as_json else "Approved.")


def _add_reveal(app: typer.Typer, commands: PseudonymCommands) -> None:
    @app.command()
    def reveal(
        request_id: Annotated[str, typer.Argument(metavar="REQUEST")],
        *,
        officer: NameOption,
        login: LoginOption,
        tenant: Annotated[str | None, typer.Option(help="Default: the configured one.")] = None,
        as_json: JSONOption = False,
    ) -> None:
        """First officer again: see who it is, once."""
        with commands.open_pseudonyms() as opened, opened.login(officer, login) as revealing:
            person = opened.pseudonymiser.reveal(
                revealing, tenant=tenant or opened.tenant, request_id=request_id
            )
        typer.echo(json.dumps({"person": person}) if as_json else person)
