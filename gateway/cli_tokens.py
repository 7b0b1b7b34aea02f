"""`havengate users sign-out` and `revoke-token`: access that was given ends now, in every worker.

A token is read from the terminal or from standard input, never from the command line, where others
on the machine could see it. Mounted by `gateway.cli_users`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gateway.cli_users import OpenProgram, UsersProgram
    from gateway.settings import IdentityProviderSettings

_JSON = typer.Option("--json", help="Print one JSON object.")
_AGAIN = "What the identity provider issues from now on counts: lock the person there, too."


def add_commands(app: typer.Typer, open_program: OpenProgram) -> None:
    """Add both to the sub-commands of `users`."""
    _add_sign_out(app, open_program)
    _add_revoke_token(app, open_program)


def _add_sign_out(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command("sign-out")
    def sign_out(
        name: Annotated[str, typer.Argument(help="The name that the person signs in with.")],
        *,
        as_json: Annotated[bool, _JSON] = False,
    ) -> None:
        """End all sessions of a person at once."""
        with open_program() as program:
            account = program.directory.accounts.named(name)
            with program.recorded("users_sign_out", account.person):
                ended = program.directory.sessions.end_all(account.id)
        _say({"ended": ended}, f"{ended} sessions of {account.login} ended.", as_json=as_json)


def _add_revoke_token(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command("revoke-token")
    def revoke_token(
        *,
        subject: Annotated[
            str | None, typer.Option(help="Revoke all tokens issued to this `sub` until now.")
        ] = None,
        jti: Annotated[str | None, typer.Option(help="Revoke the token of this `jti`.")] = None,
        issuer: Annotated[
            str | None, typer.Option(help="The provider, if there are several.")
        ] = None,
        as_json: Annotated[bool, _JSON] = False,
    ) -> None:
        """Refuse a bearer token, or all of a subject, from now on. Asks for the token itself."""
        if subject is not None and jti is not None:
            raise typer.BadParameter("give --subject or --jti, or neither to be asked for a token")
        with open_program() as program:
            if subject is not None:
                _revoke_subject(program, _provider(program.providers, issuer), subject)
                _say({"revoked": "subject"}, f"Revoked. {_AGAIN}", as_json=as_json)
                return
            if jti is not None:
                _revoke_id(program, _provider(program.providers, issuer), jti)
            else:
                _revoke_one(program, _read_token())
        _say({"revoked": "token"}, f"Revoked. {_AGAIN}", as_json=as_json)


def _revoke_subject(
    program: UsersProgram, provider: IdentityProviderSettings, subject: str
) -> None:
    from gateway.identity.bearer import last_expiry
    from gateway.identity.claims import account_of_subject
    from gateway.identity.revocations import subject_of

    person = account_of_subject(provider.issuer, subject)
    with program.recorded("users_revoke_subject", person):
        program.directory.revocations.revoke_subject(
            subject_of(provider.issuer, subject),
            until=last_expiry(provider, now=program.clock()),
        )


def _revoke_id(program: UsersProgram, provider: IdentityProviderSettings, jti: str) -> None:
    from gateway.identity.bearer import last_expiry
    from gateway.identity.revocations import token_with_id

    with program.recorded("users_revoke_token"):
        program.directory.revocations.revoke(
            token_with_id(provider.issuer, jti), until=last_expiry(provider, now=program.clock())
        )


def _revoke_one(program: UsersProgram, token: str) -> None:
    from gateway.identity.bearer import to_revoke

    found = to_revoke(token, program.providers, now=program.clock())
    with program.recorded("users_revoke_token", found.person):
        program.directory.revocations.revoke(found.token, until=found.until)


def _provider(
    providers: Sequence[IdentityProviderSettings], issuer: str | None
) -> IdentityProviderSettings:
    """The one that is meant. Raises `AccountError`."""
    from gateway.errors import AccountError

    meant = [one for one in providers if issuer in {None, one.issuer}]
    if len(meant) != 1:
        known = ", ".join(one.issuer for one in providers) or "none"
        raise AccountError(
            f"expected the issuer of one configured identity provider ({known}), got "
            f"{'none' if issuer is None else 'another'}; give --issuer as it stands in the "
            "configuration file"
        )
    return meant[0]


def _read_token() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Token", hide_input=True, err=True)).strip()
    return sys.stdin.readline().strip()


def _say(found: dict[str, object], line: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(found) if as_json else line)
