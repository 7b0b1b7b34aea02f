"""Whole exchanges over this handler: what passes unseen, and what an outsider gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from gateway.content.handler import ContentHandler
from gateway.core.commands import Answer, OpenUpstream, Release, Respond, SendUpstream, Signal
from gateway.core.exchange import Site, Summary, exchange
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.identity.model import Identified, NotIdentified
from gateway.routes import compile_routes
from gateway.settings import FieldSettings, LimitSettings, RouteSettings, RuleSettings
from keys.errors import KeyTableError, VaultUnavailableError
from tests.gateway.content.script import NOW, Seals, World, answer, in_force, patient, someone

OPAQUE = RouteSettings(
    name="app", kind="generic", upstream="http://127.0.0.1:1", path="/app", strip_path=True,
    rules=(RuleSettings(path="/p/{patient}/{rest*}", type="File"),), patient_facts="none",
)  # fmt: skip
JSON = RouteSettings(
    name="app", kind="mood", upstream="http://127.0.0.1:1", path="/app", content="json",
    rules=(RuleSettings(path="/moods", type="Mood", patient="/patient", items="/items"),),
    patient_facts="none",
)  # fmt: skip


class Whole(World):
    """The same world with a client and a stream."""

    def __init__(self, who: Identified | NotIdentified, pieces: list[bytes], app: Any) -> None:
        super().__init__(app=app)
        self.who = who
        self.pieces = iter(pieces)
        self.answer_pieces = iter([b"answer"])
        self.uploaded = b""
        self.opened: list[RequestHead] = []
        self.released: list[bytes] = []

    def do(self, command: object) -> Answer:
        kind = type(command).__name__
        if kind in {"OpenUpstream", "RecordOutcome", "StartResponse", "Respond"}:
            self.log.append(kind)
        if isinstance(command, OpenUpstream):
            self.opened.append(command.head)
        if isinstance(command, SendUpstream):
            self.uploaded += command.data or b""
        if isinstance(command, Respond | Release):
            self.released.append(command.body if isinstance(command, Respond) else command.data)
        streams: dict[str, Callable[[], Answer]] = {
            "Identify": lambda: self.who,
            "ReceiveAll": lambda: b"".join(self.pieces),
            "Receive": lambda: next(self.pieces, Signal.END),
            "ReceiveHead": lambda: ResponseHead(status=200),
            "ReceiveUpstream": lambda: next(self.answer_pieces, Signal.END),
        }
        if kind in streams:
            return streams[kind]()
        return Signal.DONE if kind in _DONE else super().do(command)


_DONE = {
    "OpenUpstream", "SendUpstream", "RecordOutcome", "StartResponse", "Respond", "Release",
    "CloseUpstream", "EndResponse",
}  # fmt: skip


def whole(
    settings: RouteSettings, world: Whole, method: str, target: str, **headers: str
) -> Summary:
    path, _, query = target.partition("?")
    fields = tuple((name.replace("_", "-"), text) for name, text in headers.items())
    head = RequestHead(
        method=method, authority="gw", path=path, query=query,
        headers=Headers((("host", "gw"), *fields)),
    )  # fmt: skip
    site = Site(
        tenant="t", routes=compile_routes([settings]), handlers={"app": ContentHandler(settings)},
        in_force=in_force, sealer=world.seals, limits=LimitSettings(),
        strip=lambda given: given, clock=lambda: NOW,
    )  # fmt: skip
    steps = exchange(head, site, request="r")
    try:
        command = next(steps)
        while True:
            command = steps.send(world.do(command))
    except StopIteration as ended:
        summary: Summary = ended.value
        assert summary.mistake is None
        return summary


@bounds(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=5))
def test_a_body_that_passes_unseen_is_the_same_in_any_pieces(pieces: list[bytes]) -> None:
    world = Whole(someone("staff"), pieces, None)
    length = str(sum(map(len, pieces)))
    assert whole(OPAQUE, world, "POST", "/app/up%20load?a=1", content_length=length).status == 200
    assert world.uploaded == b"".join(pieces)
    assert [head.target for head in world.opened] == ["/up%20load?a=1"]
    assert world.log == ["intent allow", "OpenUpstream", "RecordOutcome", "StartResponse"]


@bounds(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.booleans())
def test_an_inspected_body_is_the_same_in_any_pieces(size: int, own: bool) -> None:  # noqa: FBT001
    raw = json.dumps({"patient": "1" if own else "2", "mood": 3}).encode()
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    rule = RuleSettings(
        path="/moods", type="Mood", methods=("POST",), request_patient="/patient",
        patient="/patient",
    )  # fmt: skip
    settings = RouteSettings(
        name="app", kind="mood", upstream="http://127.0.0.1:1", path="/app", content="json",
        rules=(rule,), patient_facts="none",
    )  # fmt: skip
    world = Whole(patient("1"), pieces, lambda _head, body: answer(json.loads(body), 201))
    summary = whole(
        settings, world, "POST", "/app/moods",
        content_type="application/json", content_length=str(len(raw)),
    )  # fmt: skip
    assert summary.status == (201 if own else 403)
    assert len(world.sent) == own


def test_a_stream_about_a_patient_needs_the_relation_to_him() -> None:
    world = Whole(patient("1"), [], None)
    assert whole(OPAQUE, world, "GET", "/app/p/1/x.png").status == 200
    world = Whole(patient("1"), [], None)
    assert whole(OPAQUE, world, "GET", "/app/p/2/x.png").status == 403
    assert world.opened == []
    assert b"answer" not in world.released


def test_a_list_without_anything_of_ones_own_is_no_list() -> None:
    world = Whole(patient("1"), [], lambda _head, _body: answer({"items": [{"patient": "2"}]}))
    assert whole(JSON, world, "GET", "/app/moods").status == 403
    assert all(b"patient" not in one for one in world.released)


def test_nobody_gets_anything_without_signing_in() -> None:
    for settings, target in ((OPAQUE, "/app/x"), (JSON, "/app/moods")):
        world = Whole(NotIdentified(reason="no_credentials"), [], None)
        assert whole(settings, world, "GET", target).status == 401
        assert not world.sent
        assert not world.opened


class Keyless(Seals):
    """Seals whose keys are gone while an answer is written."""

    def pseudonym(self, **_: object) -> str:
        raise VaultUnavailableError("down")

    def tokens_for_search(self, **_: object) -> list[str]:
        raise KeyTableError("down")


def test_keys_that_fail_while_an_answer_is_written_give_nothing_away() -> None:
    forum = RouteSettings(
        name="app", kind="forum", upstream="http://127.0.0.1:1", path="/app", content="json",
        rules=(RuleSettings(path="/posts", type="Post", items="/items", author="/author"),),
    )  # fmt: skip
    notes = RouteSettings(
        name="app", kind="mood", upstream="http://127.0.0.1:1", path="/app", content="json",
        rules=(RuleSettings(path="/moods", type="Mood", patient="/patient", items="/items"),),
        fields=(FieldSettings(path="Mood:/note", seal=True, index="note"),), patient_facts="none",
    )  # fmt: skip
    for settings, target in ((forum, "/app/posts"), (notes, "/app/moods?note=x")):
        world = Whole(patient("1"), [], lambda *_: answer({"items": [{"author": "ann"}]}))
        world.seals = Keyless()
        summary = whole(settings, world, "GET", target)
        assert (summary.status, summary.failure) == (503, "gateway.keys")
        assert b"ann" not in b"".join(world.released)
        assert "RecordOutcome" in world.log or "intent allow" not in world.log
