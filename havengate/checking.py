"""What `havengate check` and `/readyz` look at, one line each.

`check` opens what it can by itself; `/readyz` asks the parts of a gateway that runs.
"""

from __future__ import annotations

import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from audit.errors import AuditError
from gateway.checks import Finding, shared_host
from gateway.errors import GatewayConfigurationError, GatewayError
from gateway.frontends.admin import Check
from gateway.routes import OWN_PREFIX
from gateway.settings import GatewaySettings, RouteSettings
from havengate.configuration import Configuration
from havengate.wiring import Program, open_keys
from keys.errors import KeysError
from policies.errors import PoliciesError

_CONNECT_S = 3.0


def readiness(settings: Configuration, program: Program) -> list[Check]:
    """The checks of a running gateway."""
    return [
        Check(name="keys", run=lambda: _keys(program)),
        Check(name="log", run=lambda: _log(program)),
        Check(name="workers", run=lambda: _workers(settings.gateway)),
        # One app that is down must not take the gateway away from in front of the others.
        *(
            Check(
                name=f"app {route.name}",
                run=partial(upstream_problem, route),
                timeout_s=_CONNECT_S + 1,
                essential=False,
            )
            for route in settings.gateway.routes
        ),
    ]


def _keys(program: Program) -> str | None:
    try:
        health = program.keys.client.health()
    except KeysError as error:
        return str(error)
    return "the key server is sealed; unseal it" if health.sealed else None


def _log(program: Program) -> str | None:
    publisher = program.log.publisher
    if publisher is None:
        return "this process does not write the log"
    failed = publisher.status().error
    return None if failed is None else f"checkpoints are not published: {failed}"


def _workers(settings: GatewaySettings) -> str | None:
    """A page of the gateway's own, asked for as a client would."""
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104
    # Not who answers is looked at, but whether: nothing is sent that anybody might want. So the
    # machine's authorities are not read, which costs more than all the rest of a look.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = HTTPSConnection(host, settings.port, timeout=_CONNECT_S, context=context)
    try:
        connection.request("GET", f"{OWN_PREFIX}jwks.json")
        status = connection.getresponse().status
    except (OSError, HTTPException):
        return "no worker answers"
    finally:
        connection.close()
    return None if status == HTTPStatus.OK else f"a worker answers {status}"


def findings(load: Callable[[], Configuration], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything that `havengate up` needs. Goes on after a finding that is not good."""
    settings = load()
    yield Finding(what="configuration", good=True, says=f"{len(settings.gateway.routes)} app(s)")
    yield _looked("files", lambda: _check_files(settings))
    yield _looked("routes", lambda: _check_gateway(settings))
    shared = shared_host(settings.gateway.routes)
    if shared is not None:
        # Not a fault: apps that trust each other may.
        yield Finding(what="hosts", good=True, says=shared)
    yield _looked("rules", lambda: _check_rules(settings))
    yield _looked("keys", lambda: _check_keys(settings, environ))
    yield _looked("log", lambda: _check_log(settings))
    yield _looked("certificate", lambda: _check_certificate(settings))
    for route in settings.gateway.routes:
        wrong = upstream_problem(route) or consents_problem(route)
        yield Finding(
            what=f"app {route.name}",
            good=wrong is None,
            says=wrong or f"{route.upstream} answers",
        )


def _looked(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, good=True, says=look())
    except (GatewayError, KeysError, PoliciesError, AuditError) as error:
        return Finding(what=what, good=False, says=f"{error} [{error.code}]")


def _check_gateway(settings: Configuration) -> str:
    from havengate.gateway_process import check_settings

    check_settings(settings.gateway)
    return ", ".join(f"{one.host or '*'}{one.path}" for one in settings.gateway.routes)


def _check_files(settings: Configuration) -> str:
    check_files(settings)
    return "rules are not open for everybody to write"


def check_files(settings: Configuration, *files: Path) -> None:
    """Raise `GatewayConfigurationError` if all may write to `files` or the clinic's own rules.

    Whoever can write a rule lets himself in: it is in force seconds later.
    """
    policies = settings.policies
    for folder in (policies.directory, policies.tables_directory):
        if folder:
            files += (Path(folder), *sorted(Path(folder).glob("*")))
    for file in files:
        try:
            status = file.stat()
        except OSError:
            # Whoever reads it says what is wrong with it.
            continue
        if status.st_mode & stat.S_IWOTH:
            raise GatewayConfigurationError(
                f"{file} decides who may see what, and everybody on this machine may write to it "
                f"(mode {status.st_mode & 0o777:o}). chmod o-w {file}."
            )


def _check_rules(settings: Configuration) -> str:
    from policies.store import load_in_force

    return f"{len(load_in_force(settings.policies).engine.bundle.rules)} rules"


def _check_keys(settings: Configuration, environ: Mapping[str, str]) -> str:
    with open_keys(settings, environ) as keys:
        keys.client.token_ttl_s()
        return f"{keys.client.address} is open to the gateway"


def _check_log(settings: Configuration) -> str:
    from audit.reader import LogReader

    directory = Path(settings.audit.directory)
    if not directory.exists():
        return "begins with the first start"
    return f"{LogReader(directory).size()} entries in {directory}"


def _check_certificate(settings: Configuration) -> str:
    from gateway.frontends.serve import check_certificate
    from havengate.gateway_process import certificate_names, check_lifetime

    tls = settings.gateway.tls
    if not tls.certificate_file and not tls.key_file:
        names = ", ".join(str(name) for name in certificate_names(settings.gateway))
        return f"issued at start, for {names}"
    certificate, key = Path(tls.certificate_file), Path(tls.key_file)
    check_certificate(certificate, key)
    check_lifetime(certificate)
    return f"{certificate} is good"


def consents_problem(route: RouteSettings) -> str | None:
    """One line if a FHIR app has no consents to ask for: then its records open to nobody."""
    asks = route.content == "fhir" and route.patient_facts == "upstream"
    if not asks or route.patient_consents == "none":
        return None
    # With `strip_path` the app does not have the route's own prefix.
    base = route.upstream.rstrip("/") + ("" if route.strip_path else route.path.rstrip("/"))
    request = Request(f"{base}/Consent?_count=1", headers={"accept": "application/fhir+json"})  # noqa: S310 - http or https, checked with the routes
    context = ssl.create_default_context(cafile=route.ca_file or None)
    try:
        with urlopen(request, timeout=_CONNECT_S, context=context) as answer:  # noqa: S310 - as above
            answer.read(1)
            return None
    except HTTPError as error:
        if error.code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return (
                f"{route.name}: the app wants a sign-in for Consent, so care teams and consents "
                "cannot be asked for. Let the gateway in without."
            )
        return (
            f"{route.name}: the app has no Consent (it answers {error.code}), so its records are "
            'closed to all staff. If it keeps no consents, write patient_consents = "none" there.'
        )
    except OSError:
        return f"{route.name}: the app did not answer a question for Consent. Look at its log."


def upstream_problem(route: RouteSettings) -> str | None:  # noqa: PLR0911 - one table
    """One line on why an app cannot be reached, or None."""
    parts = urlsplit(route.upstream)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    where = f"{route.name}: {host}:{port}"
    context: ssl.SSLContext | None = None
    if parts.scheme == "https":
        try:
            context = ssl.create_default_context(cafile=route.ca_file or None)
        except (OSError, ssl.SSLError):
            return (
                f"{route.name}: {route.ca_file} is no PEM file that can be read. Correct ca_file."
            )
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
            if context is not None:
                with context.wrap_socket(connection, server_hostname=host):
                    pass
    except ssl.SSLCertVerificationError as error:
        return (
            f"{where} shows a certificate that is not trusted ({error.verify_message}). Renew it, "
            "or name its authority in ca_file of the route."
        )
    except ssl.SSLError:
        return f"{where} does not speak TLS. If it is plain HTTP, write http:// in upstream."
    except ConnectionRefusedError:
        return f"{where} refuses connections. Start the app, or correct the port in upstream."
    except socket.gaierror:
        return f"{where}: no such host. Correct the name in upstream."
    except TimeoutError:
        return f"{where} does not answer. Is a firewall between, or is the app overloaded?"
    except OSError as error:
        return f"{where} cannot be reached: {error.strerror}. Look at upstream of the route."
    return None
