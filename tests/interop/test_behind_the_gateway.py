"""The same clients, unmodified, at the same apps, with the gateway between: they see the same."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from examples.visitor import Visitor
from tests.e2e.running import Gateway, short_directory
from tests.havengate.command import run_json
from tests.interop import drive_kolibri, drive_medplum
from tests.interop.processes import free_port

#: What the built-in rules do not let a learner do, and this clinic's teachers have to.
RULES = """
@id("clinic.teachers")
@title("Staff keep classes and end their own sessions on the learning platform")
@cites("45 CFR 164.308(a)(5)")
permit (
  principal is User in Role::"staff",
  action in [Action::"patch", Action::"delete"],
  resource is Record in ServiceKind::"elearning"
);
"""

CONFIGURATION = """
[policies]
directory = "policies"

[gateway]
port = {port}
admin_port = {admin_port}

[[gateway.identity.service_accounts]]
name = "registry"
key_hash_file = "registry.sha256"
scopes = ["system/*.cruds"]

[[gateway.routes]]
name = "{name}"
kind = "{kind}"
path = "{path}"
upstream = "{upstream}"
{more}
"""


def configured(home: Path, **values: object) -> tuple[Gateway, str]:
    """A gateway in front of one app, and the key of a program."""
    made = run_json(home, "users", "add", "registry", "--service")
    (home / "registry.sha256").write_text(made["key_sha256"], encoding="ascii")
    (home / "registry.sha256").chmod(0o600)
    (home / "policies").mkdir()
    (home / "policies" / "own.cedar").write_text(RULES, encoding="utf-8")
    port, admin_port = free_port(), free_port()
    text = CONFIGURATION.format(port=port, admin_port=admin_port, **values)
    (home / "havengate.toml").write_text(text, encoding="utf-8")
    return Gateway(home, port=port, admin_port=admin_port), str(made["key"])


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


def test_a_fhir_server_of_others_is_the_same_behind_the_gateway(
    medplum_server: str, home: Path
) -> None:
    base, _, path = medplum_server.partition("/fhir")
    gateway, key = configured(
        home,
        name="records",
        kind="ehr",
        path=f"/fhir{path}",
        upstream=base,
        more='content = "fhir"\npatient_facts = "upstream"\n'
        'fields = [{ path = "Observation.note.text", seal = true }]',
    )
    try:
        gateway.start()
        trust = ssl.create_default_context(cafile=str(gateway.ca_file))
        headers = {"authorization": f"Bearer {key}"}
        seen = drive_medplum.drive(f"{gateway.base}/fhir{path}", headers, trust)
        assert seen == list(drive_medplum.EXPECTED)
        found = run_json(home, "audit", "verify")
        assert (found["sound"], found["dangling_count"]) == (True, 0)
    finally:
        gateway.kill()


def test_a_learning_platform_of_others_is_the_same_behind_the_gateway(
    kolibri_server: str, home: Path
) -> None:
    gateway, _ = configured(
        home, name="courses", kind="elearning", path="/", upstream=kolibri_server, more=""
    )
    try:
        gateway.start()
        words = ("users", "add", "teacher", "--role", "staff", "--print-second-factor")
        account = run_json(home, *words)
        visitor = Visitor(gateway.base, gateway.ca_file)
        with closing(visitor):
            visitor.sign_in("teacher", account["password"], account["second_factor_uri"])
        cookies = [
            {"name": name, "value": value, "url": gateway.base, "secure": True, "httpOnly": True}
            for name, value in visitor.cookies.items()
        ]
        seen = drive_kolibri.drive(gateway.base, cookies=cookies)
        assert seen == list(drive_kolibri.EXPECTED)
    finally:
        gateway.kill()
