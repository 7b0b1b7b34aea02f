"""The command `havengate`: mounts each package's part and turns errors into lines and exit codes.

Exit codes, everywhere: 0 done; 1 a check found a problem, or the command was refused; 2 the command
line or the configuration is wrong; 3 something that is needed is not available (key server, log,
database): try again once it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit import cli as audit_cli
from audit.errors import (
    AuditConfigurationError,
    AuditError,
    IndexUnavailableError,
    LogUnavailableError,
    MalformedQueryError,
    WitnessError,
)
from federated import cli as studies_cli
from federated.deployment import cli as federation_cli
from federated.errors import DeploymentError, FederatedError, ManifestError
from federated.node.cli import device_app
from gateway import cli as gateway_cli
from gateway import cli_outbound, cli_users
from gateway.checks import Finding
from gateway.errors import DirectoryError, GatewayConfigurationError, GatewayError, UnavailableError
from havengate import __version__
from havengate.errors import INTERRUPTED, ConfigurationError
from havengate.operational_log import configure
from keys import cli as keys_cli
from keys.cli_pseudonyms import OpenPseudonyms, PseudonymCommands
from keys.errors import EmbeddedServerError, KeyConfigurationError, KeysError
from policies.errors import PoliciesError, RecordsUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from audit.note import VerifierKey
    from audit.ports import PersonSealer
    from federated.deployment.certificates import Certificates
    from federated.deployment.places import Places
    from havengate.configuration import Configuration
    from keys.bootstrap import BootstrapReport
    from keys.pseudonyms import Half
    from keys.settings import RoleSettings
    from policies.replay import RecordedDecision
    from policies.settings import PoliciesSettings

#: Every error that is meant to be read.
type HavengateError = (
    KeysError | AuditError | PoliciesError | GatewayError | FederatedError | ConfigurationError
)

REFUSED, WRONG, UNAVAILABLE = 1, 2, 3
#: What a gateway does without (the extra `federated`).
_OF_STUDIES = frozenset({
    "dp_accounting", "flwr", "keyring", "matplotlib", "numpy", "scipy", "shamirs", "sqlcipher3",
})  # fmt: skip

_file: Path | None = None


def main() -> None:
    """Run the command and exit with its code."""
    configure()
    try:
        build()()
    except KeyboardInterrupt:
        # The log knows what was begun; a command that was cut short may be repeated.
        typer.echo("havengate: interrupted; the command may be repeated", err=True)
        sys.exit(INTERRUPTED)
    except (
        KeysError,
        AuditError,
        PoliciesError,
        GatewayError,
        FederatedError,
        ConfigurationError,
    ) as error:
        sys.exit(_report(error))
    except ModuleNotFoundError as error:
        if error.name not in _OF_STUDIES:
            raise
        typer.echo(
            "havengate: studies and devices need libraries that are not installed here: install "
            "havengate[federated].",
            err=True,
        )
        sys.exit(UNAVAILABLE)


def build() -> typer.Typer:
    """Return the whole command. Nothing is read or opened before a sub-command runs."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="A gateway in front of mental-health apps: who may see what, sealed and on record.",
    )
    app.callback()(_options)
    app.add_typer(
        keys_cli.build(
            keys_cli.KeysCommands(
                open_program=_open_keys,
                open_to_look=_open_to_look,
                set_up=_set_up_server,
                pseudonyms=PseudonymCommands(
                    make_officer=_make_officer, open_pseudonyms=_open_pseudonyms
                ),
            )
        ),
        name="keys",
    )
    app.add_typer(
        audit_cli.build(
            audit_cli.AuditCommands(
                settings=lambda: _settings().audit,
                tenant=lambda: _settings().tenant,
                verifier_keys=_verifier_keys,
                open_sealer=_open_sealer,
                open_program=_open_audit,
            )
        ),
        name="audit",
    )
    app.add_typer(_policy_commands(), name="policy")
    gateway_cli.add_to(
        app,
        gateway_cli.GatewayCommands(file=_config_file, checks=_findings, up=_run_gateway),
    )
    app.add_typer(cli_users.build(_open_users), name="users")
    app.add_typer(
        cli_outbound.build(lambda: _settings().gateway.outbound, _config_file), name="outbound"
    )
    app.add_typer(
        studies_cli.build(
            studies_cli.StudyCommands(
                settings=lambda: _settings().federated,
                roster=_enrolled_roster,
                nodes=_enrolled_nodes,
                open_program=_open_studies,
                open_reading=_open_reading,
            )
        ),
        name="study",
    )
    app.add_typer(
        federation_cli.build(
            federation_cli.FederationCommands(
                places=_federation_places,
                certificates=_open_certificates,
                log_keys=_study_log_keys,
                coordinator_key=_coordinator_key,
            )
        ),
        name="federated",
    )
    app.add_typer(device_app, name="device")
    return app


def _config_file() -> Path:
    from havengate.configuration import DEFAULT_FILE, FILE_VARIABLE

    return _file or Path(os.environ.get(FILE_VARIABLE) or DEFAULT_FILE)


def _findings() -> Iterator[Finding]:
    from havengate.checking import findings

    return findings(_settings, os.environ)


def _run_gateway() -> None:
    from havengate import gateway_process

    gateway_process.run(_settings(), _config_file(), say=typer.echo)


def _open_users() -> AbstractContextManager[cli_users.UsersProgram]:
    from havengate.users import open_users

    return open_users(_settings(), os.environ)


def _policy_commands() -> typer.Typer:
    from policies import cli as policies_cli

    return policies_cli.build(
        policies_cli.PolicyCommands(settings=_policies_settings, records=_open_records)
    )


@contextmanager
def _open_records(since: int) -> Iterator[Iterable[RecordedDecision]]:
    from audit.reader import LogReader
    from havengate.recorded import recorded_decisions

    settings = _settings().audit
    log = LogReader(Path(settings.directory))
    yield recorded_decisions(log, since, retention_days=settings.retention_days)


def _open_studies() -> AbstractContextManager[studies_cli.StudyProgram]:
    from havengate import studies

    return studies.open_studies(_settings(), os.environ)


def _open_reading() -> AbstractContextManager[studies_cli.StudyReading]:
    from havengate import studies

    return studies.open_reading(_settings())


def _enrolled_nodes() -> int | None:
    from havengate import studies

    return studies.enrolled_nodes(_settings().federated)


def _enrolled_roster() -> str | None:
    from havengate import studies

    return studies.enrolled_roster(_settings().federated)


def _federation_places() -> Places:
    from havengate import federation

    return federation.open_places(_settings())


def _open_certificates() -> AbstractContextManager[Certificates]:
    from havengate import federation

    return federation.open_certificates(_settings(), os.environ)


def _study_log_keys() -> federation_cli.StudyLogKeys:
    from havengate import federation

    return federation.study_log_keys(_settings(), os.environ)


def _coordinator_key() -> str:
    from havengate import federation

    return federation.coordinator_key(_settings())


# The wiring needs all libraries there are; help and mistakes must not wait for them.


def _open_keys() -> AbstractContextManager[keys_cli.KeysProgram]:
    from havengate import wiring

    return wiring.open_keys_program(_settings(), os.environ)


def _open_to_look() -> AbstractContextManager[keys_cli.KeysProgram]:
    from havengate import wiring

    return wiring.open_to_look(_settings(), os.environ)


def _set_up_server(token: str, credentials: Path) -> BootstrapReport:
    from havengate import wiring

    return wiring.set_up_server(_settings(), os.environ, token, credentials)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - the signature of a callback
    if asked:
        typer.echo(f"havengate {__version__}")
        raise typer.Exit


def _options(
    *,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration file. Default: $HAVENGATE_CONFIG, ./havengate.toml."),
    ] = None,
    version: Annotated[  # noqa: ARG001 - acts before the command does
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    global _file  # noqa: PLW0603 - the one option that every sub-command shares
    _file = config


def _make_officer(name: str, half: Half, directory: Path) -> RoleSettings:
    from havengate import wiring

    return wiring.make_officer(_settings(), os.environ, name, half, directory)


def _open_pseudonyms() -> AbstractContextManager[OpenPseudonyms]:
    from havengate import wiring

    return wiring.open_pseudonyms(_settings(), os.environ)


def _open_audit() -> AbstractContextManager[audit_cli.AuditProgram]:
    from havengate import wiring

    return wiring.open_audit_program(_settings(), os.environ)


def _open_sealer() -> AbstractContextManager[PersonSealer]:
    from havengate import wiring

    return wiring.open_sealer(_settings(), os.environ)


def _verifier_keys() -> Sequence[VerifierKey]:
    from havengate.log_keys import read_verifier_keys

    return read_verifier_keys(_settings(), os.environ)


def _settings() -> Configuration:
    """What keys and log are opened by: in a wrong folder the defaults would begin them anew."""
    from havengate.configuration import load

    return load(_file, os.environ, needed=True)


def _policies_settings() -> PoliciesSettings:
    """The built-in rules can be looked at anywhere."""
    from havengate.configuration import load

    return load(_file, os.environ).policies


def _report(error: HavengateError) -> int:
    """Say what is wrong in one line, as JSON if the command was asked for JSON."""
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": error.diagnostics()}), err=True)
    else:
        # Parts of it may be what a file or a server said: nothing in it may steer a terminal.
        plain = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))
        typer.secho(f"havengate: {plain} [{error.code}]", err=True, fg=typer.colors.RED)
    return _exit_code(error)


def _exit_code(error: HavengateError) -> int:  # noqa: PLR0911 - one table
    match error:
        case (
            ConfigurationError()
            | KeyConfigurationError()
            | AuditConfigurationError()
            | MalformedQueryError()
            | GatewayConfigurationError()
            | ManifestError()
        ):
            return WRONG
        case RecordsUnavailableError():
            return UNAVAILABLE
        case PoliciesError():
            return WRONG
        case (
            LogUnavailableError() | IndexUnavailableError() | WitnessError() | EmbeddedServerError()
        ):
            return UNAVAILABLE
        case DirectoryError() | UnavailableError() | DeploymentError():
            return UNAVAILABLE
        case KeysError() if error.retryable:
            return UNAVAILABLE
        case _:
            return REFUSED


if __name__ == "__main__":
    main()
