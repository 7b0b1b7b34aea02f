"""Refusals of strangers: bounded in the log, none forgotten, nobody's place taken by another."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gateway.core import strangers
from gateway.core.strangers import Strangers
from gateway.identity.model import NotIdentified
from tests.gateway.core.test_exchange import pages
from tests.gateway.core.world import NOW, World, get

UNKNOWN = NotIdentified(reason="no_credentials")


def test_a_stranger_cannot_fill_the_log() -> None:
    clock = [NOW]
    where = replace(pages(), clock=lambda: clock[0])
    written = 0
    for _ in range(strangers.ADDRESS_BURST * 3):
        world = World(who=UNKNOWN)
        world.run(get("/a"), where)
        assert world.status == 401
        written += len(world.intents())
    assert written == strangers.ADDRESS_BURST
    clock[0] += 1 / strangers.ADDRESS_PER_S
    world = World(who=UNKNOWN)
    world.run(get("/a"), where)
    assert world.intents()[0].act.counts == {"unlogged": strangers.ADDRESS_BURST * 2}


def test_a_refusal_that_is_not_written_is_told_to_the_metrics_and_reaches_no_app() -> None:
    where = pages()
    for _ in range(strangers.ADDRESS_BURST):
        assert not World(who=UNKNOWN).run(get("/a"), where).unlogged
    world = World(who=UNKNOWN, answer=[b"page"])
    assert world.run(get("/a"), where).unlogged
    assert world.names() == ["Identify", "Respond"]


def test_whoever_is_known_is_written_down_however_many_strangers_come() -> None:
    where = pages()
    for _ in range(strangers.ADDRESS_BURST * 2):
        World(who=UNKNOWN).run(get("/a"), where)
    world = World(answer=[b"page"])
    world.run(get("/a"), where)
    assert world.status == 200
    assert len(world.intents()) == len(world.outcomes()) == 1


def test_one_address_takes_nothing_from_another() -> None:
    kept = Strangers()
    while kept.admit("192.0.2.1", NOW) is not None:
        pass
    assert kept.admit("192.0.2.2", NOW) == 0
    assert kept.admit("::ffff:192.0.2.1", NOW) is None


def test_an_ipv6_network_is_one_stranger_and_all_together_have_a_bound() -> None:
    kept = Strangers()
    admitted = sum(kept.admit(f"2001:db8::{n:x}", NOW) is not None for n in range(1_000))
    assert admitted == strangers.ADDRESS_BURST
    kept = Strangers()
    admitted = sum(
        kept.admit(f"2001:db8:{n:x}::1", NOW) is not None for n in range(strangers.ALL_BURST * 2)
    )
    assert admitted == strangers.ALL_BURST


def test_memory_is_bounded() -> None:
    kept = Strangers()
    for number in range(strangers.MAX_ADDRESSES + 100):
        kept.admit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", NOW)
    assert len(kept._known) == strangers.MAX_ADDRESSES


@given(st.lists(st.tuples(st.sampled_from(["a", "192.0.2.1", None]), st.floats(-10, 10))))
def test_every_refusal_is_written_or_counted(steps: list[tuple[str | None, float]]) -> None:
    kept, now, counted, written = Strangers(), NOW, 0, 0
    for address, pause in steps:
        now += pause
        before = kept.admit(address, now)
        if before is not None:
            written += 1
            counted += before
    waiting = sum(one.unlogged for one in kept._known.values())
    assert written + counted + waiting == len(steps)
