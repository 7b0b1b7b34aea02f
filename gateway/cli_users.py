"""`havengate users`: who may sign in, and which programs may come in.

The commands only ask and print; what they work with is opened by the program root. Each change is
written to the log before and after. A password that is generated is printed once and kept nowhere.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from gateway.cli_tokens import add_commands

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from audit.recorder import Act, Begun, End
    from gateway.identity.directory import Directory
    from gateway.identity.passwords import Passwords
    from gateway.identity.reasons import PersonSealer
    from gateway.identity.records import Account
    from gateway.identity.totp import SecondFactors, SecretStore
    from gateway.settings import IdentityProviderSettings
    from keys.ports import Clock

JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NameArgument = Annotated[str, typer.Argument(help="The name that the person signs in with.")]
AskOption = Annotated[
    bool, typer.Option("--ask-password", help="Ask for the password instead of making one.")
]
SecondFactorOption = Annotated[
    bool,
    typer.Option(
        "--print-second-factor",
        help="Set the second factor now and print it, instead of at the first sign-in.",
    ),
]
#: Bits of a password that is made here: enough without a limit on guesses.
_PASSWORD_BYTES = 15


class BlockingRecorder(Protocol):
    """`audit.recorder.Recorder`, as far as it is needed here."""

    def intent(self, act: Act) -> Begun:
        """Record what is about to happen."""
        ...

    def outcome(self, begun: Begun, end: End) -> int:
        """Record what came of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersProgram:
    """What one command works with. `actor` is who runs it, for the log.

    `roles` are those that rules know, `kv` the secrets below `gateway` on the key server,
    `sealer` seals under keys of persons,
    `providers` the identity providers whose tokens are accepted.
    """

    directory: Directory
    kv: SecretStore
    sealer: PersonSealer
    recorder: BlockingRecorder
    tenant: str
    actor: str
    roles: tuple[str, ...]
    clock: Clock
    providers: tuple[IdentityProviderSettings, ...] = ()

    @property
    def second_factors(self) -> SecondFactors:
        """Sets and forgets second factors."""
        from gateway.identity.totp import SecondFactors

        return SecondFactors(self.kv, self.directory.accounts, clock=self.clock)

    @contextmanager
    def recorded(self, what: str, person: str | None = None) -> Iterator[list[Account]]:
        """Write the intent before the block, and the outcome after it.

        `person` is the stable name of who is touched. The outcome also names the accounts that
        the block puts into the list.
        """
        from audit.recorder import Act, End, Who

        act = Act(
            tenant=self.tenant,
            who=Who(kind="person", person=self.actor, role="operator"),
            action="admin",
            service="havengate",
            # Who is touched stands sealed in the log, as every person does.
            patients=() if person is None else (person,),
            details={"what": what},
        )
        begun = self.recorder.intent(act)
        touched: list[Account] = []
        try:
            yield touched
        except BaseException:
            self.recorder.outcome(begun, End(outcome="failed"))
            raise
        persons = tuple(one.person for one in touched)
        self.recorder.outcome(begun, End(outcome="success", patients=persons))


OpenProgram = Callable[[], AbstractContextManager[UsersProgram]]


def build(open_program: OpenProgram) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `users`."""
    app = typer.Typer(no_args_is_help=True, help="Who may sign in.")
    _add_add(app, open_program)
    _add_reset(app, open_program)
    _add_lock(app, open_program)
    add_commands(app, open_program)
    _add_list(app, open_program)
    _add_break_glass(app, open_program)
    return app


def _add_add(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command()
    def add(
        name: NameArgument,
        *,
        role: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
        patient: Annotated[
            str | None, typer.Option(help="Id of the record about this person.")
        ] = None,
        represents: Annotated[
            list[str] | None, typer.Option(help="Id of a patient for whom this person may act.")
        ] = None,
        reference: Annotated[
            list[str] | None, typer.Option(help="How apps name this person: Practitioner/7.")
        ] = None,
        service: Annotated[
            bool, typer.Option("--service", help="A program: print a key and its hash.")
        ] = False,
        ask_password: AskOption = False,
        print_second_factor: SecondFactorOption = False,
        as_json: JSONOption = False,
    ) -> None:
        """Add a person, or make a key for a program."""
        if service:
            _show_service(name, as_json=as_json)
            return
        with open_program() as program:
            roles = frozenset(role or ())
            _verify_roles(roles, program.roles)
            password, hashed = _new_password(name, ask=ask_password)
            with program.recorded("users_add") as touched:
                account = program.directory.accounts.add(
                    login=name,
                    password_hash=hashed,
                    roles=roles,
                    patient=patient,
                    represents=frozenset(represents or ()),
                    references=frozenset(reference or ()),
                )
                touched.append(account)
                uri = _issue(program, account) if print_second_factor else None
            account = program.directory.accounts.named(name)
        _show_account(account, password, uri, as_json=as_json)


def _add_reset(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command()
    def reset(
        name: NameArgument,
        *,
        ask_password: AskOption = False,
        print_second_factor: SecondFactorOption = False,
        as_json: JSONOption = False,
    ) -> None:
        """Give a new password, forget the second factor, end all sessions."""
        with open_program() as program:
            account = program.directory.accounts.named(name)
            password, hashed = _new_password(account.login, ask=ask_password)
            with program.recorded("users_reset", account.person):
                # First what ends access; a seed that is left over is replaced when it is set anew.
                program.directory.accounts.reset(account.id, hashed)
                program.second_factors.forget_now(account)
                program.directory.attempts.forget("password", account.login)
                program.directory.attempts.forget("code", account.id)
                renewed = program.directory.accounts.named(name)
                uri = _issue(program, renewed) if print_second_factor else None
            renewed = program.directory.accounts.named(name)
        _show_account(renewed, password, uri, as_json=as_json)


def _add_lock(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command()
    def lock(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Let a person sign in no more. Sessions end at once."""
        with open_program() as program:
            account = program.directory.accounts.named(name)
            with program.recorded("users_lock", account.person):
                program.directory.accounts.lock(account.id)
        _say({"locked": account.login}, f"{account.login} is locked.", as_json=as_json)

    @app.command()
    def unlock(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Let a person sign in again, at once even after too many attempts."""
        with open_program() as program:
            account = program.directory.accounts.named(name)
            with program.recorded("users_unlock", account.person):
                program.directory.accounts.unlock(account.id)
                program.directory.attempts.forget("password", account.login)
                program.directory.attempts.forget("code", account.id)
        _say({"unlocked": account.login}, f"{account.login} may sign in.", as_json=as_json)


def _add_list(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command("list")
    def list_(*, as_json: JSONOption = False) -> None:
        """Show all persons who may sign in."""
        with open_program() as program, program.recorded("users_list"):
            accounts = program.directory.accounts.all()
        if as_json:
            typer.echo(json.dumps([_object(account) for account in accounts]))
            return
        for account in accounts:
            marks = [*sorted(account.roles)]
            marks += [f"patient {account.patient}"] if account.patient else []
            marks += [*sorted(account.references)]
            marks += ["locked"] if account.locked else []
            marks += ["second factor not set"] if account.must_set_second_factor else []
            typer.echo(f"{account.login:<24} {', '.join(marks)}")


def _add_break_glass(app: typer.Typer, open_program: OpenProgram) -> None:
    @app.command("break-glass")
    def break_glass(
        *,
        days: Annotated[int, typer.Option(min=1, help="How far to look back.")] = 7,
        as_json: JSONOption = False,
    ) -> None:
        """Show who opened whose record in an emergency, and why, for review."""
        from gateway.identity.reasons import Reasons
        from gateway.identity.shared_secret import SharedSecret
        from gateway.identity.wiring import REASONS_SECRET

        with open_program() as program, program.recorded("users_break_glass"):
            before = SharedSecret.open(program.kv, REASONS_SECRET, program.directory.database)
            program.directory.grants.keep_reasons_under(Reasons(program.sealer, before=before))
            grants = program.directory.grants.since(program.clock() - days * 86_400)
            logins = {one.id: one.login for one in program.directory.accounts.all()}
        found = [
            {
                "grant": grant.id,
                "name": logins.get(grant.account, grant.account),
                "patient": grant.patient,
                "reason": grant.reason,
                "begins": _time(grant.begins_at),
                "ends": _time(grant.ends_at),
            }
            for grant in grants
        ]
        if as_json:
            typer.echo(json.dumps(found))
            return
        for one in found:
            typer.echo(f"{one['begins']} to {one['ends']}  {one['name']}  patient {one['patient']}")
            typer.echo(f"    {one['reason']!r}")


def _verify_roles(roles: frozenset[str], known: tuple[str, ...]) -> None:
    from gateway.errors import AccountError

    unknown = sorted(roles.difference(known))
    if unknown:
        raise AccountError(
            f"expected roles that rules know ({', '.join(known)}), got {unknown[0]!r}; correct it, "
            "or name it in policies.roles"
        )


def _new_password(login: str, *, ask: bool) -> tuple[str | None, str]:
    """The password, if it was made here, and its hash."""
    from gateway.identity.passwords import Passwords, check_new_password

    hasher: Passwords = Passwords()
    try:
        if not ask:
            made = secrets.token_urlsafe(_PASSWORD_BYTES)
            return made, hasher.hash_now(made)
        chosen = str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
        check_new_password(chosen, login=login)
        return None, hasher.hash_now(chosen)
    finally:
        hasher.close()


def _issue(program: UsersProgram, account: Account) -> str:
    return program.second_factors.issue_now(account).uri


def _show_service(name: str, *, as_json: bool) -> None:
    from gateway.identity.service_accounts import make_key

    key, hashed = make_key(name)
    if as_json:
        typer.echo(json.dumps({"name": name, "key": key, "key_sha256": hashed}))
        return
    typer.echo(f"Key, shown once; give it to the program alone:\n  {key}")
    typer.echo(f"Its hash, for a file of mode 0600:\n  {hashed}")
    typer.echo("In your configuration file:\n\n[[gateway.identity.service_accounts]]")
    typer.echo(f'name = "{name}"\nkey_hash_file = "secrets/{name}.sha256"')


def _show_account(
    account: Account, password: str | None, uri: str | None, *, as_json: bool
) -> None:
    if as_json:
        found = _object(account)
        found |= {"password": password, "second_factor_uri": uri}
        typer.echo(json.dumps(found))
        return
    typer.echo(f"Name            {account.login}")
    if password is not None:
        typer.echo(f"Password        {password}   (shown once)")
    if uri is not None:
        typer.echo(f"Second factor   {uri}   (shown once)")
    else:
        typer.echo("Second factor   set up at the first sign-in, which must be soon")


def _object(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "name": account.login,
        "roles": sorted(account.roles),
        "patient": account.patient,
        "represents": sorted(account.represents),
        "references": sorted(account.references),
        "locked": account.locked,
        "second_factor_set": not account.must_set_second_factor,
        "created": _time(account.created_at),
    }


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")


def _say(found: dict[str, Any], line: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(found) if as_json else line)
