"""Files of a federation: closed to others, strict, and never another key under a known name."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from federated.deployment.cli import FederationCommands, StudyLogKeys, build
from federated.deployment.places import (
    MOST_PEOPLE,
    EnrolledNode,
    Places,
    add_to_roster,
    ensure_node_keys,
    read_node_keys,
    read_roster,
)
from federated.errors import BudgetExhaustedError, DeploymentError, FederatedError
from federated.manifest import roster_hash
from federated.node.enrolment import parse_enrolment
from keys.errors import KeysError
from tests.federated.ledgers import MemoryLog, close_all, cost, make_ledger
from tests.federated.studies import ORIGIN, MemorySigner, StudyLog


def node_of(directory: Path, *, site: str = "") -> EnrolledNode:
    keys = ensure_node_keys(directory)
    return EnrolledNode(
        identity=keys.identity_public.hex(),
        fleet=keys.fleet_public.decode(),
        flower_id="18446744073709551615",
        site=site,
    )


def test_secrets_and_keys_are_made_once_and_closed_to_others(tmp_path: Path) -> None:
    places = Places(directory=tmp_path / "federation")
    places.prepare()
    before = places.control_secret.read_bytes()
    places.prepare()
    assert places.control_secret.read_bytes() == before
    assert len(before) == 32
    keys = ensure_node_keys(places.node("one"))
    assert ensure_node_keys(places.node("one")).identity_public == keys.identity_public
    for path in places.directory.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    ensure_node_keys(tmp_path / "one")
    (tmp_path / "one" / "identity.pem").chmod(0o644)
    with pytest.raises(KeysError):
        read_node_keys(tmp_path / "one")


def test_a_roster_hashes_as_studies_do_and_keeps_64_bit_ids(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    one, two = node_of(tmp_path / "one"), node_of(tmp_path / "two", site="north")
    add_to_roster(path, "one", one)
    add_to_roster(path, "two", two)
    roster = read_roster(path)
    assert roster.hash == roster_hash(
        {"one": bytes.fromhex(one.identity), "two": bytes.fromhex(two.identity)},
        {"two": "north"},
    )
    assert roster.flower_ids()["one"] == 2**64 - 1
    assert roster.charged("one")[1:] == ["device:one"]
    assert roster.charged("two")[1:] == ["site:north"]
    keys = {roster.charged(name)[0] for name in ("one", "two")}
    assert len(keys) == 2
    assert all(re.fullmatch(r"key:[0-9a-f]{32}", key) for key in keys)


@pytest.mark.parametrize("site", ["south", ""])
def test_another_name_of_a_site_gives_its_people_no_new_budget(tmp_path: Path, site: str) -> None:
    path = tmp_path / "roster.json"
    add_to_roster(path, "one", node_of(tmp_path / "one", site="north"))
    budgets = make_ledger(f"sqlite:///{tmp_path}/l.sqlite3", MemoryLog(), cap=1.0)
    budgets.reserve(
        study="5a" * 32,
        round_id="1-0",
        participants=read_roster(path).charged("one"),
        cost=cost(1.0),
    )
    path.write_text(path.read_text().replace('"north"', f'"{site}"'))
    path.write_text(path.read_text().replace('"one":', '"another":'))
    with pytest.raises(BudgetExhaustedError):
        budgets.reserve(
            study="6b" * 32,
            round_id="2-0",
            participants=read_roster(path).charged("another"),
            cost=cost(0.1),
        )
    close_all()


def test_another_key_of_a_site_gives_its_people_no_new_budget(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    for name in ("one", "two"):
        add_to_roster(path, name, node_of(tmp_path / name, site="north"))
    first, second = (set(read_roster(path).charged(name)) for name in ("one", "two"))
    assert first & second == {"site:north"}


@pytest.mark.parametrize(
    ("name", "site"), [("one", "south"), ("one", ""), ("two", "north"), ("two", "south")]
)
def test_refuses_a_known_key_under_another_name_site_or_class(
    tmp_path: Path, name: str, site: str
) -> None:
    path = tmp_path / "roster.json"
    add_to_roster(path, "one", node_of(tmp_path / "one", site="north"))
    before = path.read_bytes()
    with pytest.raises(DeploymentError, match="keeps its name and its site"):
        add_to_roster(path, name, node_of(tmp_path / "one", site=site))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"site": "north"', '"site": "north pole"'),
        ('"one":', '"o/ne":'),
        ("FIRST", "SECOND"),
        ("FIRST", "ab"),
    ],
)
def test_a_roster_whose_budgets_could_not_be_told_apart_is_refused(
    tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "roster.json"
    one, two = node_of(tmp_path / "one", site="north"), node_of(tmp_path / "two")
    add_to_roster(path, "one", one)
    add_to_roster(path, "two", two)
    said = {"FIRST": one.identity, "SECOND": two.identity}
    text = path.read_text()
    changed = text.replace(said.get(old, old), said.get(new, new))
    assert changed != text
    path.write_text(changed)
    with pytest.raises(DeploymentError):
        read_roster(path)


def test_a_study_is_approved_with_each_nodes_site(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    add_to_roster(path, "one", node_of(tmp_path / "one", site="north"))
    hashes = {read_roster(path).hash}
    for site in ("south", ""):
        path.write_text(re.sub('"site": "[a-z]*"', f'"site": "{site}"', path.read_text()))
        hashes.add(read_roster(path).hash)
    assert len(hashes) == 3


def test_a_device_speaks_for_one_person_and_a_site_for_as_many_as_its_enrolment_says(
    tmp_path: Path,
) -> None:
    path = tmp_path / "roster.json"
    two = node_of(tmp_path / "two", site="north")
    add_to_roster(path, "one", node_of(tmp_path / "one"))
    add_to_roster(path, "two", two)
    three = msgspec.structs.replace(node_of(tmp_path / "three", site="south"), most_people=5068)
    add_to_roster(path, "three", three)
    roster = read_roster(path)
    found = {name: roster.most_people(name) for name in roster.nodes}
    assert found == {"one": 1, "two": MOST_PEOPLE, "three": 5068}
    # Started anew: as it was, unless another site is named.
    assert roster.terms("three", "") == roster.terms("three", "south") == ("south", 5068)
    assert roster.terms("three", "north") == ("north", 0)
    assert roster.terms("four", "") == ("", 0)
    old = json.loads(path.read_text())
    del old["nodes"]["two"]["most_people"]
    path.write_text(json.dumps(old))
    assert read_roster(path) == roster
    for most in (-1, 10**9 + 1):
        old["nodes"]["two"]["most_people"] = most
        path.write_text(json.dumps(old))
        with pytest.raises(DeploymentError, match="most_people"):
            read_roster(path)


def test_a_name_never_gets_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    add_to_roster(path, "one", node_of(tmp_path / "one"))
    with pytest.raises(DeploymentError, match="other keys"):
        add_to_roster(path, "one", node_of(tmp_path / "other"))


@pytest.mark.parametrize("content", ["", "[]", '{"nodes": {"one": {}}}', '{"more": 1}'])
def test_a_damaged_roster_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "roster.json"
    path.write_text(content)
    with pytest.raises(DeploymentError):
        read_roster(path)


def commands(tmp_path: Path) -> FederationCommands:
    log = StudyLog(tmp_path)
    return FederationCommands(
        places=lambda: Places(directory=tmp_path / "federation"),
        certificates=lambda: pytest.fail("nothing may be started here"),
        log_keys=lambda: StudyLogKeys(
            origin=ORIGIN,
            log_keys=[key.text for key in log.keys],
            witness_keys=[key.text for key in log.witness_keys],
        ),
        coordinator_key=MemorySigner(bytes(32)).public.hex,
    )


def test_trust_writes_what_nodes_and_superlink_read(tmp_path: Path) -> None:
    board, officer = MemorySigner().public.hex(), MemorySigner().public.hex()
    app = build(commands(tmp_path))
    done = CliRunner().invoke(app, ["trust", "--board", board, "--site", f"north={officer}"])
    assert done.exit_code == 0, done.output
    file = tmp_path / "federation" / "federation.json"
    trusted = parse_enrolment(file.read_bytes()).trusted()
    assert trusted.ethics_board == {bytes.fromhex(board)}
    assert trusted.sites["north"] == {bytes.fromhex(officer)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_trust_refuses_what_is_no_key(tmp_path: Path) -> None:
    done = CliRunner().invoke(build(commands(tmp_path)), ["trust", "--board", "abc"])
    assert isinstance(done.exception, FederatedError)


def test_keys_prints_public_halves_only(tmp_path: Path) -> None:
    app = build(commands(tmp_path))
    done = CliRunner().invoke(app, ["keys", "clinic-1", str(tmp_path / "node")])
    public = json.loads(done.stdout)
    assert public.keys() == {"name", "identity", "fleet"}
    assert "PRIVATE" not in done.output
    assert public["identity"] == read_node_keys(tmp_path / "node").identity_public.hex()


@pytest.mark.parametrize("verb", [["status"], ["enrol", "file"]])
def test_says_what_to_do_when_nothing_was_started(tmp_path: Path, verb: list[str]) -> None:
    done = CliRunner().invoke(build(commands(tmp_path)), verb)
    assert isinstance(done.exception, DeploymentError)
    assert "havengate federated up" in str(done.exception)
