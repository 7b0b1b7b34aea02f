"""The composition root of commands and demo: settings in, working parts out. Wired by hand.

Everything is opened for the length of a `with` block and closed in reverse. Nothing here decides
anything; it only knows who needs whom. `keys` and `audit` do not know each other's objects: the
keyring seals names for the log, and the log records what is done to keys, through ports.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from audit.cli import AuditProgram
from audit.entry import parse_entry
from audit.errors import AuditError, LogUnavailableError
from audit.log import LogWriter
from audit.note import VerifierKey
from audit.ports import Signer
from audit.publish import Publisher
from audit.reader import LogReader
from audit.recorder import Appender, KeyEventLog, Recorder, clock_step_entry, repair_entry
from audit.retention import first_readable
from audit.settings import AuditSettings
from audit.transport import BlockingLogClient
from audit.witness import WitnessClient
from havengate.configuration import Configuration
from havengate.log_keys import log_verifier_keys
from keys.blindindex import BlindIndex
from keys.bootstrap import BootstrapReport, bootstrap, create_officer, credential_files
from keys.cli import KeysProgram
from keys.cli_pseudonyms import OpenPseudonyms
from keys.database import KeyDatabase
from keys.embedded import EmbeddedServer, verify_audit_file
from keys.epochs import EpochKeeper
from keys.erasure import Eraser
from keys.errors import KeyConfigurationError, KeysError
from keys.keyring import Keyring
from keys.layout import AUDIT_SIGNING_KEY
from keys.ports import KeyEvent, KeyEventRecorder
from keys.pseudonyms import Half, Pseudonymiser
from keys.reidentification import VaultHalves, VaultOfficer
from keys.server import KeyServer, open_server, with_environment
from keys.settings import RoleSettings
from keys.signing import VaultSigner
from keys.store import KeyStore
from keys.table import KeyTable
from keys.transit import TransitKeyWrapper
from keys.vault import FixedToken, VaultClient

_log = structlog.get_logger()

#: How an erasure looks in the bytes of an entry.
_ERASURE = b'"action":"keys.person.erase"'


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenKeys:
    """The key server, the key table and the keyring, logged in as `gateway`."""

    server: KeyServer
    client: VaultClient
    database: KeyDatabase
    keyring: Keyring


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLog:
    """The log as seen by this process: its own writer, or that of a running gateway.

    `writer` and `publisher` are None where another process holds the log.
    """

    appender: Appender
    writer: LogWriter | None
    publisher: Publisher | None

    def publish(self) -> None:
        """Publish what is sequenced, if this process is the writer; a running gateway does so."""
        if self.publisher is not None:
            self.publisher.publish()


@contextmanager
def open_keys(settings: Configuration, environ: Mapping[str, str]) -> Iterator[OpenKeys]:
    """Open what sealing needs. Raises a `KeysError`."""
    with ExitStack() as stack:
        server = stack.enter_context(open_server(settings.keys, environ=environ))
        client = stack.enter_context(server.client("gateway"))
        database = KeyDatabase(settings.keys.table_url)
        stack.callback(database.close)
        store = KeyStore(
            table=KeyTable(database),
            wrapper=TransitKeyWrapper(client),
            settings=settings.keys.cache,
            clock=time.time,
        )
        stack.callback(store.close)
        yield OpenKeys(server=server, client=client, database=database, keyring=Keyring(store))


@contextmanager
def open_log(settings: AuditSettings, signer: Signer) -> Iterator[OpenLog]:
    """Open the log for writing: through the socket of a running writer, or else as the writer.

    As the writer it mends what a crash left, writes that down, and publishes at the end. Raises an
    `AuditError`.
    """
    client = BlockingLogClient(Path(settings.socket))
    try:
        client.connect()
    except LogUnavailableError:
        with _own_writer(settings, signer) as opened:
            yield opened
    else:
        with client:
            yield OpenLog(appender=client, writer=None, publisher=None)


@contextmanager
def _own_writer(settings: AuditSettings, signer: Signer) -> Iterator[OpenLog]:
    witnesses = [
        WitnessClient(
            item.url,
            key=VerifierKey.parse(item.verifier_key),
            timeout_s=settings.witness_timeout_s,
        )
        for item in settings.witnesses
    ]
    with ExitStack() as stack:
        writer = stack.enter_context(
            LogWriter.open(
                Path(settings.directory),
                origin=settings.origin,
                max_batch=settings.max_batch,
                max_queue=settings.max_queue,
                clock_step_entry=clock_step_entry,
            )
        )
        if writer.recovery.cut_bytes:
            writer.append(repair_entry(cut_bytes=writer.recovery.cut_bytes, time_s=time.time()))
        publisher = stack.enter_context(
            Publisher(
                writer,
                signer,
                interval_s=settings.publish_interval_s,
                witnesses=witnesses,
            )
        )
        publisher.start()
        stack.callback(_publish_last, writer, publisher)
        yield OpenLog(appender=writer, writer=writer, publisher=publisher)


def _publish_last(writer: LogWriter, publisher: Publisher) -> None:
    """Publish what this command wrote; should that fail, the next one does, and nothing is lost."""
    if publisher.status().size == writer.size:
        return
    try:
        publisher.publish()
    except (KeysError, AuditError) as error:
        _log.warning("audit.publish_deferred", **error.diagnostics())


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Keys and log, wired together."""

    keys: OpenKeys
    log: OpenLog
    recorder: Recorder
    key_events: KeyEventLog
    blind_index: BlindIndex
    commands: KeysProgram
    #: Asks the key server; use `verifier_keys`.
    read_verifier_keys: Callable[[], tuple[VerifierKey, ...]]

    @property
    def verifier_keys(self) -> tuple[VerifierKey, ...]:
        """The log's keys. Raises a `VaultError`: only who needs them must wait for the server."""
        return self.read_verifier_keys()


@contextmanager
def open_program(settings: Configuration, environ: Mapping[str, str]) -> Iterator[Program]:
    """Open keys, the operator's role and the log. Raises a `KeysError` or an `AuditError`."""
    with ExitStack() as stack:
        keys = stack.enter_context(open_keys(settings, environ))
        operator = stack.enter_context(keys.server.client("operator"))
        signer = VaultSigner(stack.enter_context(keys.server.client("audit")), AUDIT_SIGNING_KEY)
        log = stack.enter_context(open_log(settings.audit, signer))
        key_events = KeyEventLog(
            log.appender, sealer=keys.keyring, clock=time.time, tenant=settings.tenant
        )
        commands = _keys_program(settings, environ, keys, operator, key_events)
        yield Program(
            keys=keys,
            log=log,
            key_events=key_events,
            recorder=Recorder(
                log.appender, sealer=keys.keyring, clock=time.time, ids=new_request_id
            ),
            blind_index=commands.index,
            commands=commands,
            read_verifier_keys=lambda: log_verifier_keys(settings.audit, signer),
        )


@contextmanager
def open_to_look(settings: Configuration, environ: Mapping[str, str]) -> Iterator[KeysProgram]:
    """Open what `havengate keys` looks at, without the log: nothing can be changed through it."""
    with ExitStack() as stack:
        keys = stack.enter_context(open_keys(settings, environ))
        operator = stack.enter_context(keys.server.client("operator"))
        yield _keys_program(settings, environ, keys, operator, NothingRecorded())


class NothingRecorded:
    """Stands where the log would: what is not recorded must not be done."""

    def record(self, event: KeyEvent) -> int:
        """Raises `LogUnavailableError`."""
        raise LogUnavailableError(f"The log is not open, so {event.action} must not happen.")


def _keys_program(
    settings: Configuration,
    environ: Mapping[str, str],
    keys: OpenKeys,
    operator: VaultClient,
    recorder: KeyEventRecorder,
) -> KeysProgram:
    store = keys.keyring.store
    keeper = EpochKeeper(
        store,
        operator=TransitKeyWrapper(operator),
        settings=settings.keys.epochs,
        recorder=recorder,
    )
    return KeysProgram(
        tenant=settings.tenant,
        actor=current_user(environ),
        server=keys.client,
        keeper=keeper,
        eraser=Eraser(keys.keyring, database=keys.database, epochs=keeper, recorder=recorder),
        index=BlindIndex(store, settings=settings.keys.index, recorder=recorder),
        verify_server=lambda: _verify_server(keys),
        erased_in_log=lambda: erased_keys(settings.audit),
    )


def _verify_server(keys: OpenKeys) -> None:
    if isinstance(keys.server, EmbeddedServer):
        verify_audit_file(keys.server, keys.client)


def erased_keys(settings: AuditSettings) -> Iterator[str]:
    """Give the ids of keys that erasures destroyed, from the log itself: the index may be old."""
    directory = Path(settings.directory)
    if not directory.exists():
        # Nothing was ever recorded, so nothing was erased.
        return
    log = LogReader(directory)
    first = first_readable(log, now_s=time.time(), retention_days=settings.retention_days)
    for _, raw in log.read(first):
        if _ERASURE in raw:
            entry = parse_entry(raw)
            if entry.outcome == "success":
                yield from entry.key_ids


def new_request_id() -> str:
    """Return 128 random bits: what binds an intent to its outcome."""
    return secrets.token_hex(16)


@contextmanager
def open_keys_program(settings: Configuration, environ: Mapping[str, str]) -> Iterator[KeysProgram]:
    """Open what `havengate keys` works with."""
    with open_program(settings, environ) as program:
        yield program.commands


@contextmanager
def open_audit_program(
    settings: Configuration, environ: Mapping[str, str]
) -> Iterator[AuditProgram]:
    """Open what `havengate audit` works with when it writes into the log."""
    with open_program(settings, environ) as program:
        yield AuditProgram(
            tenant=settings.tenant,
            actor=program.commands.actor,
            appender=program.log.appender,
            recorder=program.recorder,
            sealer=program.keys.keyring,
        )


@contextmanager
def open_sealer(settings: Configuration, environ: Mapping[str, str]) -> Iterator[Keyring]:
    """Open what finds and opens names in entries, and not the log."""
    with open_keys(settings, environ) as keys:
        yield keys.keyring


def set_up_server(
    settings: Configuration, environ: Mapping[str, str], token: str, credentials: Path
) -> BootstrapReport:
    """Prepare the configured server of the operator's own with an administrator's token."""
    with _administrator(settings, environ, token) as client:
        return bootstrap(client, settings.keys, credentials)


def make_officer(
    settings: Configuration, environ: Mapping[str, str], name: str, half: Half, directory: Path
) -> RoleSettings:
    """Make an officer's login, as the administrator of the embedded server or of one's own.

    It is logged before and after: who could make both logins could re-identify alone.
    """
    with ExitStack() as stack:
        if with_environment(settings.keys.vault, environ).address:
            token = environ.get("VAULT_TOKEN", "")
            client = stack.enter_context(_administrator(settings, environ, token))
            program = stack.enter_context(open_program(settings, environ))
        else:
            program = stack.enter_context(open_program(settings, environ))
            embedded = stack.enter_context(EmbeddedServer(settings.keys))
            client = stack.enter_context(embedded.administer())
        intent = KeyEvent(
            action="keys.officer.create",
            stage="intent",
            request_id=new_request_id(),
            tenant="",
            actor=program.commands.actor,
            detail={"half": half},
        )
        program.key_events.record(intent)
        succeeded = False
        try:
            made = create_officer(client, name, half, directory)
            succeeded = True
        finally:
            program.key_events.record(replace(intent, stage="outcome", succeeded=succeeded))
        return made


@contextmanager
def _administrator(
    settings: Configuration, environ: Mapping[str, str], token: str
) -> Iterator[VaultClient]:
    vault = with_environment(settings.keys.vault, environ)
    if not vault.address:
        raise KeyConfigurationError(
            "expected a key server of your own to set up, got none; name it as address under "
            "[keys.vault] or in VAULT_ADDR. The server that Havengate brings sets itself up"
        )
    if not token:
        raise KeyConfigurationError(
            "expected an administrator's token in VAULT_TOKEN, got none; log in with `bao login` "
            "or `vault login` and export it for this one command"
        )
    with VaultClient(
        settings=vault, role="administrator", credentials=FixedToken(token=token)
    ) as client:
        yield client


@contextmanager
def open_pseudonyms(
    settings: Configuration, environ: Mapping[str, str]
) -> Iterator[OpenPseudonyms]:
    """Open what pseudonyms and their undoing need, the log included."""
    with open_program(settings, environ) as program:

        @contextmanager
        def login(name: str, directory: Path) -> Iterator[VaultOfficer]:
            files = credential_files(directory, f"officer-{name}")
            with program.keys.server.login(f"officer-{name}", files) as own:
                yield VaultOfficer(own)

        yield OpenPseudonyms(
            tenant=settings.tenant,
            pseudonymiser=Pseudonymiser(
                program.keys.keyring,
                database=program.keys.database,
                halves=VaultHalves(program.keys.client),
                recorder=program.key_events,
            ),
            login=login,
        )


def current_user(environ: Mapping[str, str]) -> str:
    """Return who runs a command, for the log: the person behind sudo, if any."""
    name = environ.get("SUDO_USER")
    if not name:
        import pwd

        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            # In a container, a user often has a number only.
            name = f"uid-{os.getuid()}"
    return f"operator/{name}"
