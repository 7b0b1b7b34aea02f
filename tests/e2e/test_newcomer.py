"""Somebody who has an app and has never seen Havengate: it works at once, or says what to do.

Each mistake gets one line on what to do, and a documented exit code: 1 a problem was found or the
command refused, 2 command line or configuration, 3 something needed is not available.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import pty
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from examples.visitor import Visitor
from tests.e2e.own_vault import own_vault
from tests.e2e.running import Courses, Gateway, short_directory
from tests.havengate.command import run, run_json
from tests.interop.processes import REPOSITORY, free_port
from tests.openbao import RunningServer, wait_until

#: A gateway that starts although it should not would serve until then.
pytestmark = pytest.mark.timeout(180)

#: A rule that lets everybody who has signed in have what is in `ResourceType::"Page"`.
RULE = """
@id("clinic.reading")
@title("Everybody signed in reads the courses")
@cites("45 CFR 164.502(b)")
permit (
  principal is User,
  action == Action::"read",
  resource is Record in ServiceKind::"generic"
);
"""
BROKEN_RULE = RULE.replace("permit (", "permit [")


@pytest.fixture(scope="module")
def app() -> Iterator[Courses]:
    """An app on another port."""
    courses = Courses()
    yield courses
    courses.close()


@pytest.fixture
def home(tmp_path: Path, app: Courses, openbao: RunningServer) -> Path:
    """A folder with what `init` wrote, using a key server that runs already."""
    init(tmp_path, app)
    add(tmp_path, f"[keys.embedded]\ndirectory = '{openbao.settings.embedded.directory}'\n")
    return tmp_path


def init(home: Path, app: Courses, port: int | None = None) -> str:
    """Run `init` with its four answers as options, for an ordinary app."""
    number = port if port is not None else neighbouring_ports()
    words = ("--upstream", f"127.0.0.1:{app.port}", "--kind", "generic", "--content", "opaque")
    code, out, err = run(home, "init", *words, "--port", str(number))
    assert (code, err) == (0, "")
    return out


def add(home: Path, text: str) -> None:
    file = home / "havengate.toml"
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def replace(home: Path, old: str, new: str) -> None:
    file = home / "havengate.toml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def neighbouring_ports() -> int:
    """A free port whose next one, for health and metrics, is free as well."""
    while True:
        port = free_port()
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def refused(home: Path, *words: str, **env: str) -> tuple[int, str]:
    """The code of a command that does not work, and the one line that it says."""
    code, _, err = run(home, *words, env=env)
    # What the program tells a monitoring system stands in lines of its own.
    lines = [line for line in err.strip().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return code, lines[0]


def wrong(home: Path, what: str) -> str:
    """The one line of `check` about `what`, which has to be wrong, with exit code 1."""
    code, out, err = run(home, "check", "--json")
    assert (code, err) == (1, "")
    (found,) = [one for one in json.loads(out) if one["what"] == what]
    assert not found["good"]
    assert "\n" not in found["says"]
    return str(found["says"])


# --- The first try --------------------------------------------------------------------------------


def test_init_check_and_up_work_at_the_first_try_in_an_empty_folder(app: Courses) -> None:
    with short_directory() as home:
        port = neighbouring_ports()
        told = init(home, app, port)
        assert "havengate check" in told
        assert "havengate up" in told
        steps = [line for line in told.splitlines() if line.startswith("  ")]
        assert len({line.rindex("  ") for line in steps}) == 1, told
        (home / "rules").mkdir()
        add(home, '[policies]\ndirectory = "rules"\n')
        gateway = Gateway(home, port=port, admin_port=port + 1)
        gateway.start()
        try:
            code, out, err = run(home, "check")
            assert (code, err) == (0, ""), out
            assert "wrong" not in out
            account = run_json(
                home, "users", "add", "nell", "--role", "staff", "--print-second-factor"
            )
            visitor = Visitor(gateway.base, gateway.ca_file)
            with closing(visitor):
                assert visitor.get("/hello").status == 401
                visitor.sign_in("nell", account["password"], account["second_factor_uri"])
                answer = visitor.get("/hello")
                assert (answer.status, answer.text) == (200, "a course")
                rules_change_between_two_requests(home, gateway, visitor)
            second_start_is_refused(home)
        finally:
            processes = [gateway.process, *gateway.process.children(recursive=True)]
            gateway.process.kill()
            # Whoever is killed takes everything that it started along.
            wait_until(lambda: not any(runs(one) for one in processes))
            gateway.kill()


def runs(process: psutil.Process) -> bool:
    """Whether a process is there, and not only waits to be noticed."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def rules_change_between_two_requests(home: Path, gateway: Gateway, visitor: Visitor) -> None:
    """A broken rule changes nothing and is told; a good one takes force."""
    rules = home / "rules"
    closing_rule = RULE.replace("permit (", "forbid (").replace(
        "@cites", '@reason("The library is closed.")\n@remedy("administrator")\n@cites'
    )
    (rules / "own.cedar").write_text(BROKEN_RULE, encoding="utf-8")
    wait_until(lambda: "policies.refused" in gateway.words)
    assert "own.cedar" in gateway.words
    assert visitor.get("/hello").status == 200
    (rules / "own.cedar").write_text(closing_rule, encoding="utf-8")
    wait_until(lambda: visitor.get("/hello").status == 403)
    assert "The library is closed." in visitor.get("/hello").text
    (rules / "own.cedar").unlink()
    wait_until(lambda: visitor.get("/hello").status == 200)


def second_start_is_refused(home: Path) -> None:
    """On the same port, and with other ports on the same directory."""
    code, line = refused(home, "up")
    assert code == 2
    assert "Nothing can listen on" in line
    moved = home / "moved.toml"
    other = neighbouring_ports()
    text = (home / "havengate.toml").read_text(encoding="utf-8").splitlines()
    text = [f"port = {other}" if one.startswith("port =") else one for one in text]
    text = [f"admin_port = {other + 1}" if one.startswith("admin_port =") else one for one in text]
    moved.write_text("\n".join(text), encoding="utf-8")
    code, said = program(home, "--config", str(moved), "up")
    assert code == 2
    assert "a gateway is running on this configuration already" in said


def program(home: Path, *words: str) -> tuple[int, str]:
    """Run the program as a process of its own; its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "havengate", *words],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


# --- init -----------------------------------------------------------------------------------------


def test_init_leaves_a_file_that_is_there(tmp_path: Path, app: Courses) -> None:
    init(tmp_path, app)
    before = (tmp_path / "havengate.toml").read_bytes()
    code, line = refused(tmp_path, "init", "--upstream", "127.0.0.1:1")
    assert code == 2
    assert "--force" in line
    assert (tmp_path / "havengate.toml").read_bytes() == before


def test_init_without_a_terminal_names_the_option_that_is_missing(tmp_path: Path) -> None:
    words: tuple[str, ...] = ("init",)
    for option, value in (
        ("--upstream", "127.0.0.1:9000"),
        ("--kind", "mood"),
        ("--content", "opaque"),
        ("--port", "9443"),
    ):
        code, line = refused(tmp_path, *words)
        assert code == 2
        assert option in line
        assert not (tmp_path / "havengate.toml").exists()
        words += (option, value)
    assert run(tmp_path, *words)[0] == 0


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--upstream", "ftp://records", "http://127.0.0.1:8080"),
        ("--upstream", "http://me:secret@records", "password"),
        ("--upstream", "http://records:99999", "http://127.0.0.1:8080"),
        ("--kind", "clinic", "Known are: ehr"),
        ("--content", "xml", "fhir or opaque"),
        ("--port", "70000", "65534"),
    ],
)
def test_init_says_what_an_answer_has_to_be(
    tmp_path: Path, option: str, value: str, told: str
) -> None:
    answers = {
        "--upstream": "127.0.0.1:9000", "--kind": "ehr", "--content": "fhir", "--port": "9443",
    }  # fmt: skip
    words = [word for pair in {**answers, option: value}.items() for word in pair]
    code, line = refused(tmp_path, "init", *words)
    assert code == 2
    assert told in line
    assert "secret" not in line
    assert not (tmp_path / "havengate.toml").exists()


def test_init_asks_four_questions_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "havengate", "init"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as asked:
        os.close(theirs)
        os.write(ours, b"127.0.0.1:9000/fhir\nehr\n\n9443\n")
        said, _ = asked.communicate(timeout=60)
    os.close(ours)
    assert asked.returncode == 0, said
    written = (tmp_path / "havengate.toml").read_text(encoding="utf-8")
    assert 'upstream = "http://127.0.0.1:9000"' in written
    assert 'path = "/fhir"' in written
    assert 'content = "fhir"' in written
    assert "port = 9443" in written


def test_init_asks_again_only_what_was_answered_wrongly(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "havengate", "init"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as asked:
        os.close(theirs)
        os.write(ours, b"ftp://records\n127.0.0.1:9000\nclinic\nmood\nxml\n\nmany\n9443\n")
        said, _ = asked.communicate(timeout=60)
    os.close(ours)
    text = said.decode()
    assert asked.returncode == 0, text
    for question in ("Address of your app", "What is it?", "Does it speak FHIR?", "Port for"):
        assert text.count(question) == 2, question
    written = (tmp_path / "havengate.toml").read_text(encoding="utf-8")
    assert 'upstream = "http://127.0.0.1:9000"' in written
    assert 'kind = "mood"' in written
    assert "port = 9443" in written


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["up", "check"])
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("admin_port", "admn_port", "“gateway.admn_port”. Did you mean “admin_port”?"),
        ("upstream =", "upsteam =", "Did you mean “upstream”?"),
        ('tenant = "clinic"', "tenant = clinic", "is not valid TOML"),
        ('kind = "generic"', 'kind = "hospital"', "gateway.routes[0].kind"),
        ("port = ", "port = 1", "gateway.port"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    home: Path, command: str, old: str, new: str, told: str
) -> None:
    replace(home, old, new)
    code, line = refused(home, command)
    assert code == 2
    assert told in line
    assert "havengate.toml" in line


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, line = refused(tmp_path, "up")
    assert code == 2
    assert "havengate.toml" in line


def test_a_gateway_without_apps_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "havengate.toml").write_text('tenant = "clinic"\n', encoding="utf-8")
    code, line = refused(tmp_path, "up")
    assert code == 2
    assert "havengate init" in line


# --- Ports and the app ----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["gateway.port", "gateway.admin_port"])
def test_a_port_that_is_taken_is_named(home: Path, setting: str) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        name = setting.removeprefix("gateway.")
        lines = (home / "havengate.toml").read_text(encoding="utf-8").splitlines()
        lines = [f"{name} = {port}" if one.startswith(f"{name} =") else one for one in lines]
        (home / "havengate.toml").write_text("\n".join(lines), encoding="utf-8")
        code, line = refused(home, "up")
    assert code == 2
    assert str(port) in line
    assert setting in line


def test_an_app_that_is_down_or_on_another_port_is_named(home: Path, app: Courses) -> None:
    replace(home, f":{app.port}", f":{free_port()}")
    assert "Start the app, or correct the port in upstream" in wrong(home, "app app")


def test_an_app_on_a_host_that_does_not_exist_is_named(home: Path, app: Courses) -> None:
    replace(home, f"127.0.0.1:{app.port}", "records.invalid")
    assert "no such host" in wrong(home, "app app")


def test_an_app_without_tls_behind_https_is_named(home: Path, app: Courses) -> None:
    replace(home, f"http://127.0.0.1:{app.port}", f"https://127.0.0.1:{app.port}")
    assert "write http://" in wrong(home, "app app")


def test_an_app_whose_certificate_has_expired_is_named(home: Path, app: Courses) -> None:
    with expired_app(home) as port:
        behind_tls(home, app, port)
        assert "certificate has expired" in wrong(home, "app app")


def test_up_says_which_apps_it_does_not_reach_and_stands_in_front_of_the_others(
    home: Path, app: Courses
) -> None:
    nobody = free_port()
    text = (home / "havengate.toml").read_text(encoding="utf-8")
    (port,) = [int(one.split()[2]) for one in text.splitlines() if one.startswith("port =")]
    with expired_app(home) as expired, short_directory() as short:
        behind_tls(home, app, expired)
        for name, number in (("away", nobody), ("good", app.port)):
            add(
                home,
                f'[[gateway.routes]]\nname = "{name}"\nkind = "generic"\npath = "/{name}"\n'
                f'upstream = "http://127.0.0.1:{number}"\ncontent = "opaque"\n',
            )
        # The log's socket has a short name.
        add(home, f"[audit]\nsocket = '{short}/audit.sock'\n")
        gateway = Gateway(home, port=port, admin_port=port + 1)
        gateway.start()
        try:
            lines = gateway.words.splitlines()
        finally:
            gateway.stop()
    told = [one for one in lines if "not reached" in one]
    assert len(told) == 2, lines
    (away,) = [one for one in told if f":{nobody}" in one]
    assert "Start the app, or correct the port in upstream" in away
    (old,) = [one for one in told if f":{expired}" in one]
    assert "certificate has expired" in old
    assert "Renew it" in old


@contextmanager
def expired_app(home: Path) -> Iterator[int]:
    """An app that shows a certificate that was good until the day before yesterday."""
    write_certificate(home, "app", days=-2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "app.pem", home / "app.key")
    courses = Courses(context)
    yield courses.port
    courses.close()


def behind_tls(home: Path, app: Courses, port: int) -> None:
    replace(
        home,
        f'upstream = "http://127.0.0.1:{app.port}"\ncontent',
        f'upstream = "https://localhost:{port}"\nca_file = "app.pem"\ncontent',
    )


# --- Certificates ---------------------------------------------------------------------------------


def certificate(home: Path, *, days: int) -> None:
    """A certificate that ends in `days` days, and its key, named in the configuration."""
    write_certificate(home, "own", days=days)
    add(home, '[gateway.tls]\ncertificate_file = "own.pem"\nkey_file = "own.key"\n')


def write_certificate(home: Path, file: str, *, days: int) -> None:
    """One for `localhost` that ends in `days` days, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=400))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, SHA256())
    )
    (home / f"{file}.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (home / f"{file}.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )


def test_an_expired_certificate_is_named_with_its_dates(home: Path) -> None:
    certificate(home, days=-3)
    assert "so not today. Renew it" in wrong(home, "certificate")
    code, line = refused(home, "up")
    assert code == 2
    assert "so not today. Renew it" in line


def test_up_that_was_refused_leaves_no_trace_in_its_process(home: Path) -> None:
    certificate(home, days=-3)
    before = dict(os.environ)
    mask = os.umask(0o022)
    try:
        assert refused(home, "up")[0] == 2
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    assert dict(os.environ) == before


@pytest.mark.parametrize("missing", ["own.pem", "own.key"])
def test_a_certificate_or_key_that_is_missing_is_named(home: Path, missing: str) -> None:
    certificate(home, days=30)
    (home / missing).unlink()
    assert missing in wrong(home, "certificate")
    code, line = refused(home, "up")
    assert code == 2
    assert missing in line


def test_a_certificate_in_force_is_good(home: Path) -> None:
    certificate(home, days=30)
    found = json.loads(run(home, "check", "--json")[1])
    assert [one["what"] for one in found if not one["good"]] == []


# --- The key server -------------------------------------------------------------------------------


def test_a_key_server_that_is_not_there_is_named(home: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    files = key_server_files(home)
    add(home, f"[keys.vault]\naddress = '{address}'\nattempts = 1\n{files}")
    assert address in wrong(home, "keys")
    code, line = refused(home, "up")
    assert code == 3
    assert address in line


def test_a_key_server_without_a_login_is_named(home: Path) -> None:
    add(home, "[keys.vault]\naddress = 'http://127.0.0.1:9'\n")
    code, line = refused(home, "up")
    assert code == 2
    assert "[keys.vault.roles.gateway]" in line


def test_a_key_server_of_ones_own_that_is_sealed_is_named_with_what_to_do(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with own_vault(tmp_path_factory.mktemp("vault")) as vault:
        add(home, vault.configuration)
        found = json.loads(run(home, "check", "--json")[1])
        assert [one for one in found if not one["good"]] == []
        vault.seal()
        told = wrong(home, "keys")
        code, line = refused(home, "up")
    assert code == 3
    for said in (told, line):
        assert vault.address in said
        assert "unseal" in said


def key_server_files(home: Path) -> str:
    text = ""
    for role in ("gateway", "operator", "audit"):
        for half in ("role", "secret"):
            file = home / f"{role}.{half}"
            file.write_text("made-up", encoding="ascii")
            file.chmod(0o600)
        text += (
            f"[keys.vault.roles.{role}]\n"
            f"role_id_file = '{role}.role'\nsecret_id_file = '{role}.secret'\n"
        )
    return text


# --- Rules ----------------------------------------------------------------------------------------


def test_a_broken_rule_is_named_by_file_and_line_and_nothing_starts(home: Path) -> None:
    (home / "rules").mkdir()
    (home / "rules" / "own.cedar").write_text(BROKEN_RULE, encoding="utf-8")
    add(home, '[policies]\ndirectory = "rules"\n')
    assert "own.cedar:" in wrong(home, "rules")
    code, line = refused(home, "up")
    assert code == 2
    assert "own.cedar:" in line


def test_a_folder_of_rules_that_is_not_there_is_named(home: Path) -> None:
    add(home, '[policies]\ndirectory = "ruels"\n')
    code, line = refused(home, "up")
    assert code == 2
    assert "ruels" in line
