"""An app's call as a script of commands: who, where to, and nothing before the log has it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.recorder import Begun
from gateway.core import outbound
from gateway.core.commands import (
    CloseUpstream,
    EndResponse,
    Failed,
    Receive,
    ReceiveHead,
    ReceiveUpstream,
    Recorded,
    RecordIntent,
    RecordOutcome,
    Release,
    Respond,
    SendUpstream,
    Signal,
    StartResponse,
)
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.core.outbound import IdentifyApp, OpenOutside, Outside, Tunnel, Way
from gateway.errors import BadRequestError, GatewayConfigurationError
from gateway.identity.model import Identified, NotIdentified
from gateway.outbound.addresses import AddressRefusedError, CheckedResolver, is_special
from gateway.outbound.apps import Apps, hash_key, load_apps, new_key
from gateway.outbound.listing import compile_listing, parse_authority, parse_host
from gateway.settings import DestinationSettings, OutboundAppSettings, OutboundSettings
from keys.private_files import write_private
from policies.model import Principal
from policies.settings import PoliciesSettings
from policies.store import PolicyStore

STORE = PolicyStore(PoliciesSettings())
EHR = Identified(
    principal=Principal(
        kind="service", id="ehr", roles=frozenset({"app"}), purposes=frozenset({"TREAT"})
    ),
    means="proxy",
    person="ehr",
    purpose="TREAT",
    role="app",
    client="ehr",
)
SETTINGS = OutboundSettings(
    apps=(
        OutboundAppSettings(name="ehr", key_hash_file="unused"),
        OutboundAppSettings(name="forum", key_hash_file="unused"),
    ),
    destinations=(
        DestinationSettings(host="Lab.Example.org", purposes=("TREAT",), apps=("ehr",)),
        DestinationSettings(host="*.example.net", purposes=("TREAT",)),
        DestinationSettings(host="203.0.113.7", port=8443, purposes=("TREAT",)),
    ),
)
OUTSIDE = Outside(
    tenant="clinic-a",
    listing=compile_listing(SETTINGS),
    in_force=lambda: STORE.current,
    max_body_bytes=100,
    clock=lambda: 1_800_000_000.0,
)
TUNNEL = Tunnel(app=EHR, host="lab.example.org", port=443)
WAY = Way(encrypted=True, tunnel=TUNNEL, server_name="lab.example.org")


def head(method: str = "GET", **headers: str) -> RequestHead:
    fields = {"host": "lab.example.org", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return RequestHead(
        method=method,
        authority="lab.example.org:443",
        path="/x",
        headers=Headers(tuple(fields.items())),
        client="127.0.0.1",
    )


@dataclass
class World:
    """Answers commands; `broken` names one that fails. Keeps all of them in order."""

    body: list[bytes] = field(default_factory=list)
    answer: ResponseHead = field(default_factory=lambda: ResponseHead(status=200))
    content: list[bytes] = field(default_factory=list)
    broken: dict[type, Any] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)

    def perform(self, command: Any) -> Any:  # noqa: PLR0911 - one answer for each command
        self.seen.append(command)
        if type(command) in self.broken:
            return self.broken[type(command)]
        match command:
            case IdentifyApp(credentials=credentials):
                return EHR if credentials == "good" else NotIdentified(reason="bad_token")
            case RecordIntent(act=act):
                return Recorded(begun=Begun(request="r", index=0, act=act, sealed={}))
            case Receive():
                return self.body.pop(0) if self.body else Signal.END
            case ReceiveHead():
                return self.answer
            case ReceiveUpstream():
                return self.content.pop(0) if self.content else Signal.END
        return Signal.DONE

    def kinds(self) -> list[type]:
        return [type(command) for command in self.seen]

    def only(self, kind: type) -> list[Any]:
        return [command for command in self.seen if isinstance(command, kind)]


def run(steps: outbound.Steps[Any], world: World) -> Any:
    command = next(steps)
    while True:
        try:
            command = steps.send(world.perform(command))
        except StopIteration as stop:
            return stop.value


def call(world: World, asked: RequestHead | None = None, way: Way = WAY) -> Any:
    return run(outbound.call(asked or head(), way, OUTSIDE, request="q"), world)


def respond(world: World) -> int:
    (answer,) = world.only(Respond)
    status: int = answer.head.status
    return status


# --- The order ------------------------------------------------------------------------------------


def test_a_call_goes_its_way_in_order() -> None:
    world = World(body=[b"ab", b"c"], content=[b"xyz"])
    summary = call(world, head("POST", content_length="3"))
    assert world.kinds() == [
        RecordIntent, OpenOutside, Receive, SendUpstream, Receive, SendUpstream, Receive,
        SendUpstream, ReceiveHead, RecordOutcome, StartResponse, ReceiveUpstream, Release,
        ReceiveUpstream, EndResponse, CloseUpstream,
    ]  # fmt: skip
    assert (summary.status, summary.decision, summary.failure) == (200, "allow", None)
    assert world.only(RecordOutcome)[0].end.bytes_in == 3


FAILURES: list[Any] = [
    Failed(code="x.broken"),
    Signal.GONE, Signal.DONE, Signal.END, b"bytes", ResponseHead(status=200),
]  # fmt: skip


@settings(deadline=None)
@given(
    at=st.sampled_from(
        [
            RecordIntent,
            OpenOutside,
            Receive,
            SendUpstream,
            ReceiveHead,
            RecordOutcome,
            StartResponse,
            ReceiveUpstream,
            Release,
            IdentifyApp,
        ]
    ),
    failure=st.sampled_from(FAILURES),
    through_tunnel=st.booleans(),
)
def test_whatever_goes_wrong_nothing_overtakes_the_log(
    at: type, failure: Any, *, through_tunnel: bool
) -> None:
    # A side that gives the same bytes for ever is cut off by the limit.
    world = World(body=[b"ab"], content=[b"xyz"], broken={at: failure})
    asked = head("POST", content_length="2", proxy_authorization="good")
    call(world, asked, WAY if through_tunnel else Way(encrypted=True))
    kinds = world.kinds()
    if OpenOutside in kinds:
        assert kinds.index(RecordIntent) < kinds.index(OpenOutside)
        assert at is not RecordIntent
    for released in (StartResponse, Release):
        if released in kinds:
            assert kinds.index(RecordOutcome) < kinds.index(released)
            assert at is not RecordOutcome or failure is Signal.DONE
    assert kinds.count(RecordOutcome) <= 1
    if RecordIntent in kinds and at not in {RecordIntent, RecordOutcome}:
        assert kinds.count(RecordOutcome) == 1
    # Whatever was opened is closed, whoever waits hears something or has gone.
    if OpenOutside in kinds and at is not OpenOutside:
        assert CloseUpstream in kinds
    assert {Respond, StartResponse} & set(kinds) or failure is Signal.GONE


def test_a_mistake_of_the_core_lets_nothing_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("Patient/7")

    monkeypatch.setattr(outbound, "clean_request", explode)
    world = World()
    summary = call(world)
    assert respond(world) == 500
    assert OpenOutside not in world.kinds()
    assert world.only(RecordOutcome)[0].end.outcome == "failed"
    assert summary.mistake == "RuntimeError"
    assert b"Patient" not in world.only(Respond)[0].body


# --- Who and where --------------------------------------------------------------------------------


def test_an_app_that_is_not_known_is_asked_to_show_itself() -> None:
    world = World()
    call(world, head(proxy_authorization="bad"), Way(encrypted=True))
    assert respond(world) == 407
    assert world.kinds() == [IdentifyApp, RecordIntent, RecordOutcome, Respond]
    assert world.only(RecordIntent)[0].act.decision == "deny"


def test_credentials_in_a_tunnel_are_not_looked_at_again_and_never_sent() -> None:
    world = World()
    call(world, head(proxy_authorization="good", proxy_connection="keep-alive"))
    sent = world.only(OpenOutside)[0].head.headers
    assert not [name for name, _ in sent if name.startswith("proxy-")]
    assert IdentifyApp not in world.kinds()


def test_what_tells_of_the_inside_does_not_go_out() -> None:
    world = World()
    call(world, head(x_forwarded_for="10.0.0.1", forwarded="for=10.0.0.1", havengate_identity="e"))
    names = {name for name, _ in world.only(OpenOutside)[0].head.headers}
    assert not names & {"x-forwarded-for", "forwarded", "havengate-identity"}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("lab.example.org", 200),
        ("LAB.example.ORG", 200),
        ("a.example.net", 200),
        ("a.b.example.net", 200),
        ("example.net", 403),
        ("evilexample.net", 403),
        ("other.example.org", 403),
    ],
)
def test_only_what_the_list_names_is_called(host: str, expected: int) -> None:
    world = World()
    asked = RequestHead(
        method="GET",
        authority=f"{host}:443",
        path="/",
        headers=Headers((("host", host), ("proxy-authorization", "good"))),
        client="127.0.0.1",
    )
    assert call(world, asked, Way(encrypted=True)).status == expected


@pytest.mark.parametrize(
    "way",
    [
        Way(encrypted=True, tunnel=Tunnel(app=EHR, host="a.example.net", port=443)),
        Way(encrypted=True, tunnel=Tunnel(app=EHR, host="lab.example.org", port=8443)),
        Way(encrypted=True, tunnel=TUNNEL, server_name="a.example.net"),
        Way(encrypted=True, tunnel=TUNNEL, server_name="lab.example.org."),
    ],
)
def test_who_names_two_hosts_reaches_none(way: Way) -> None:
    world = World()
    call(world, None, way)
    assert respond(world) in {400, 421}
    assert OpenOutside not in world.kinds()
    assert world.only(RecordIntent)[0].act.decision == "deny"


def test_nothing_goes_out_unless_it_is_encrypted() -> None:
    world = World()
    asked = RequestHead(
        method="GET",
        authority="a.example.net:443",
        path="/",
        headers=Headers((("host", "a.example.net:443"), ("proxy-authorization", "good"))),
        scheme="http",
        client="127.0.0.1",
    )
    call(world, asked, Way(encrypted=False))
    assert respond(world) == 403
    assert world.only(RecordIntent)[0].act.rules == ("outbound.encrypted",)


def test_a_tunnel_is_agreed_without_an_entry_and_refused_with_one() -> None:
    world = World()
    asked = head("CONNECT", proxy_authorization="good")
    assert run(outbound.open_tunnel(asked, OUTSIDE, request="q"), world) == TUNNEL
    assert world.kinds() == [IdentifyApp]
    world = World()
    elsewhere = RequestHead(
        method="CONNECT",
        authority="ada.evil.example:443",
        path="",
        headers=Headers((("proxy-authorization", "good"),)),
        client="127.0.0.1",
    )
    assert run(outbound.open_tunnel(elsewhere, OUTSIDE, request="q"), world) is None
    assert world.kinds() == [IdentifyApp, RecordIntent, RecordOutcome, Respond]
    assert world.only(RecordIntent)[0].act.details["host"] == "evil.example"


# --- Sizes ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=60), max_size=6),
    answer=st.lists(st.binary(min_size=1, max_size=60), max_size=6),
)
def test_no_more_passes_than_may_whatever_the_pieces(
    pieces: list[bytes], answer: list[bytes]
) -> None:
    world = World(body=list(pieces), content=list(answer))
    call(world, head("POST", transfer_encoding="chunked"))
    sent = b"".join(one.data for one in world.only(SendUpstream) if one.data)
    given_back = b"".join(one.data for one in world.only(Release))
    assert len(sent) <= 100
    assert len(given_back) <= 100
    if len(b"".join(pieces)) > 100:
        assert SendUpstream(data=None) not in world.seen
        assert respond(world) == 413
    else:
        assert sent == b"".join(pieces)
        ends = world.only(EndResponse)
        assert ends == [EndResponse(broken=len(b"".join(answer)) > 100)]


@pytest.mark.parametrize("status", [100, 101, 199])
def test_an_answer_that_leaves_http_is_not_released(status: int) -> None:
    world = World(answer=ResponseHead(status=status))
    call(world)
    assert respond(world) == 502


# --- List, addresses, keys ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", ".", "a..b", "a.", "-a.b", "a_b.c d", "127.1", "1", "0x7f.0.0.1", "0177.0.0.1", "a.1",
     "ä.example", "a" * 64 + ".b", "a@b", "a/b", "a\n", "fe80::1%eth0", "[::1", "*.a.b"],
)  # fmt: skip
def test_a_host_has_one_spelling(text: str) -> None:
    with pytest.raises(BadRequestError):
        parse_host(text)


@settings(deadline=None)
@given(st.ip_addresses())
def test_an_address_is_spelt_as_an_address(address: Any) -> None:
    assert ip_address(parse_host(str(address))) in {address, getattr(address, "ipv4_mapped", None)}


@pytest.mark.parametrize(
    "text", ["a", "a:", "a:0", "a:65536", "a:b", "a:1:2", "u@a:1", "[::1]1", ":1"]
)
def test_an_authority_is_host_and_port(text: str) -> None:
    with pytest.raises(BadRequestError):
        parse_authority(text, default_port=None)


@pytest.mark.parametrize("host", ["*", "*.", "*.org", "*.*.org", "a.*.org", "*.0.0.1", "", "ä.org"])
def test_a_list_that_cannot_be_meant_is_refused(host: str) -> None:
    settings = OutboundSettings(destinations=(DestinationSettings(host=host, purposes=("TREAT",)),))
    with pytest.raises(GatewayConfigurationError):
        compile_listing(settings)


def test_a_list_that_names_an_unknown_app_is_refused() -> None:
    entry = DestinationSettings(host="a.example", purposes=("TREAT",), apps=("ehrr",))
    with pytest.raises(GatewayConfigurationError, match="ehrr"):
        compile_listing(OutboundSettings(destinations=(entry,)))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255",  # noqa: S104 - refused
     "::1", "::", "fe80::1", "ff02::1", "fd00:ec2::254", "100.100.100.200", "::ffff:127.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe", "no address"],
)  # fmt: skip
def test_addresses_of_this_machine_and_its_link_are_special(address: str) -> None:
    assert is_special(address)


@pytest.mark.parametrize(
    "address", ["203.0.113.7", "10.1.2.3", "192.168.1.1", "2001:db8::1", "fd12::1"]
)
def test_other_addresses_are_not(address: str) -> None:
    assert not is_special(address)


def resolver(*addresses: str, listed: Iterable[str] = ()) -> CheckedResolver:
    async def resolve(host: str, port: int) -> list[str]:
        del host, port
        return list(addresses)

    entries = tuple(DestinationSettings(host=one, purposes=("TREAT",)) for one in listed)
    return CheckedResolver(compile_listing(OutboundSettings(destinations=entries)), resolve)


async def test_a_name_that_leads_here_is_not_called() -> None:
    for addresses in (["127.0.0.1"], ["203.0.113.7", "169.254.169.254"], ["::ffff:127.0.0.1"], []):
        with pytest.raises(AddressRefusedError):
            await resolver(*addresses, listed=["lab.example.org"])("lab.example.org", 443)
    assert await resolver("203.0.113.7")("lab.example.org", 443) == ["203.0.113.7"]


async def test_only_an_address_that_is_listed_itself_leads_here() -> None:
    assert await resolver("127.0.0.1", listed=["localhost"])("localhost", 443) == ["127.0.0.1"]
    assert await resolver("127.0.0.1", listed=["127.0.0.1"])("127.0.0.1", 443) == ["127.0.0.1"]
    for host, port in (("localhost", 444), ("a.localhost", 443), ("127.0.0.2", 443)):
        with pytest.raises(AddressRefusedError):
            await resolver("127.0.0.1", listed=["localhost", "127.0.0.1"])(host, port)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def apps(directory: Path, **keys: str) -> Apps:
    named = []
    for name, key in keys.items():
        write_private(directory / name, hash_key(key).encode())
        named.append(OutboundAppSettings(name=name, key_hash_file=str(directory / name)))
    return load_apps(OutboundSettings(apps=tuple(named)))


def test_an_app_is_known_by_its_own_key_only(tmp_path: Path) -> None:
    ehr, forum = new_key(), new_key()
    known = apps(tmp_path, ehr=ehr, forum=forum)
    found = known.identify(basic(f"ehr:{ehr}"))
    assert isinstance(found, Identified)
    assert found.principal.id == "ehr"
    for wrong in (
        None, "", "Basic", "Basic !", basic("ehr"), basic(f"ehr:{forum}"), basic(f":{ehr}"),
        basic(f"EHR:{ehr}"), basic(f"ehr:{ehr} "), f"Bearer {ehr}", basic("ehr:" + hash_key(ehr)),
        basic(f"nobody:{ehr}"), "Basic " + "A" * 5_000, basic("ehr:\0"),
    ):  # fmt: skip
        assert isinstance(known.identify(wrong), NotIdentified)
    assert ehr not in repr(known)
    assert hash_key(ehr) not in repr(known)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o644),
        lambda path: path.unlink(),
        lambda path: path.write_text("not a digest"),
        lambda path: path.write_text("A" * 64),
    ],
)
def test_a_digest_that_others_can_read_or_that_is_none_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    apps(tmp_path, ehr=new_key())
    spoil(tmp_path / "ehr")
    settings = OutboundAppSettings(name="ehr", key_hash_file=str(tmp_path / "ehr"))
    with pytest.raises(GatewayConfigurationError):
        load_apps(OutboundSettings(apps=(settings,)))
    with pytest.raises(GatewayConfigurationError):
        load_apps(OutboundSettings(apps=(OutboundAppSettings(name="Eh r", key_hash_file="x"),)))
