"""The cache: its bounds, one fetch for many waiters, and that no destroyed key is ever used."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.hmac import HMAC
from hypothesis import given
from hypothesis import strategies as st

from keys import aead
from keys.datakeys import DataKey, DataKeyCache, KeyGoneError, KeyName, SealBudget
from keys.errors import (
    KeyExhaustedError,
    KeyTableError,
    VaultRejectedError,
    VaultUnavailableError,
)
from keys.model import KeyOwner
from keys.settings import CacheSettings
from tests.keys.fakes import FakeClock

Fetch = Callable[[Sequence[KeyName]], Mapping[KeyName, DataKey]]


def owner_of(name: str) -> KeyOwner:
    return KeyOwner("person", "clinic-a", name)


def make_key(name: str, raw: bytes | None = None) -> DataKey:
    return DataKey(
        key_id=name,
        owner=owner_of(name),
        version=1,
        key=raw or os.urandom(32),
        budget=SealBudget(10),
    )


def fetch_all(names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
    return {name: make_key(name if isinstance(name, str) else name.name) for name in names}


def make_cache(clock: FakeClock | None = None, **settings: float) -> DataKeyCache:
    return DataKeyCache(CacheSettings(**settings), clock or FakeClock())  # type: ignore[arg-type]


def derive(key: DataKey) -> bytes:
    return key.derive(aead.MESSAGE_LABEL, bytes(16), b"place")


# --- Bounds ---------------------------------------------------------------------------------------


def test_drops_a_key_that_is_too_old() -> None:
    clock = FakeClock()
    cache = make_cache(clock, max_age_s=300.0)
    cache.load(["k"], fetch_all)
    clock.advance(299.9)
    assert cache.get("k") is not None
    clock.advance(0.1)
    assert cache.get("k") is None
    assert len(cache) == 0


def test_age_counts_from_before_the_request() -> None:
    clock = FakeClock()
    cache = make_cache(clock, max_age_s=300.0)

    def slow(names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        clock.advance(200)
        return fetch_all(names)

    cache.load(["k"], slow)
    clock.advance(100)
    assert cache.get("k") is None


def test_drops_a_key_after_its_uses() -> None:
    cache = make_cache(max_uses=3)
    cache.load(["k"], fetch_all)
    assert cache.get("k") is not None
    assert cache.get("k") is not None
    assert cache.get("k") is None


def test_keeps_the_most_recently_used() -> None:
    cache = make_cache(max_entries=2)
    cache.load(["a", "b"], fetch_all)
    cache.get("a")
    cache.load(["c"], fetch_all)
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None


@given(
    st.lists(
        st.tuples(st.sampled_from(["load", "get", "empty", "tick", "back"]), st.integers(0, 9)),
        max_size=60,
    )
)
def test_never_holds_more_or_older_than_allowed(steps: list[tuple[str, int]]) -> None:
    clock = FakeClock()
    cache = make_cache(clock, max_age_s=10.0, max_entries=4, max_uses=5)
    handed_out: dict[str, int] = {}
    loaded_at: dict[str, float] = {}
    real_s = 0.0  # time that truly passes, whatever the clock shows
    for step, number in steps:
        name = f"k{number}"
        match step:
            case "load":
                before = cache.get(name)
                if before is None:
                    loaded_at[name], handed_out[name] = real_s, 0
                    cache.load([name], fetch_all)
                handed_out[name] += 1
            case "get":
                if cache.get(name) is not None:
                    handed_out[name] += 1
                    assert real_s - loaded_at[name] < 10.0
            case "empty":
                cache.empty()
                assert len(cache) == 0
            case "tick":
                clock.advance(number)
                real_s += number
            case _:
                clock.advance(-number)
        assert len(cache) <= 4
        assert all(uses <= 5 for uses in handed_out.values())


def test_a_clock_that_steps_back_empties_the_cache() -> None:
    clock = FakeClock()
    cache = make_cache(clock, max_age_s=300.0)
    cache.load(["k"], fetch_all)
    clock.advance(299)
    cache.get("k")
    clock.advance(-290)
    assert cache.get("k") is None


def test_sweeping_drops_what_nobody_asks_for_any_more() -> None:
    clock = FakeClock()
    cache = make_cache(clock, max_age_s=300.0)
    cache.load(["a"], fetch_all)
    clock.advance(200)
    cache.load(["b"], fetch_all)
    clock.advance(150)
    cache.sweep()
    assert len(cache) == 1


# --- Erasing --------------------------------------------------------------------------------------


def test_an_evicted_key_is_held_by_nobody() -> None:
    cache = make_cache(max_entries=1)
    held = weakref.ref(Watched.watch(cache))
    assert held() is not None
    cache.load(["b"], fetch_all)
    assert held() is None


class Watched(DataKey):
    """A key whose end can be seen."""

    __slots__ = ("__weakref__",)

    @classmethod
    def watch(cls, cache: DataKeyCache) -> DataKey:
        """Load one such key."""

        def fetch(_names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
            return {
                "a": cls(
                    key_id="a",
                    owner=owner_of("a"),
                    version=1,
                    key=os.urandom(32),
                    budget=SealBudget(1),
                )
            }

        return cache.load(["a"], fetch)["a"]


def test_an_evicted_key_still_serves_the_thread_that_holds_it() -> None:
    cache = make_cache(max_entries=1)
    key = cache.load(["a"], fetch_all)["a"]
    expected = derive(key)
    cache.load(["b"], fetch_all)
    assert derive(key) == expected


def test_emptying_destroys_every_key_even_one_in_use() -> None:
    cache = make_cache()
    keys = cache.load(["a", "b"], fetch_all)
    cache.empty()
    for key in keys.values():
        assert key._hash is None
        with pytest.raises(KeyGoneError):
            derive(key)
        with pytest.raises(KeyGoneError):
            key.mac(b"message")


def test_a_racing_seal_gets_the_right_answer_or_none() -> None:
    raw = os.urandom(32)
    right = aead.derive(aead.key_hash(raw), aead.MESSAGE_LABEL, bytes(16), b"place")
    for _ in range(300):
        key = make_key("k", raw)
        start = threading.Barrier(5)

        def work(key: DataKey = key, start: threading.Barrier = start) -> set[bytes]:
            start.wait()
            seen = set()
            try:
                for _ in range(30):
                    seen.add(derive(key))
            except KeyGoneError:
                pass
            return seen

        with ThreadPoolExecutor(5) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            start.wait()
            key.destroy()
            results = [worker.result() for worker in workers]
        assert all(seen <= {right} for seen in results)


def test_a_derivation_that_began_before_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = os.urandom(32)
    right = aead.derive(aead.key_hash(raw), aead.MESSAGE_LABEL, bytes(16), b"place")
    key = make_key("k", raw)
    inside, go_on = threading.Event(), threading.Event()
    real = aead.derive

    def slow(secret: HMAC, label: bytes, salt: bytes, associated: bytes) -> bytes:
        inside.set()
        go_on.wait(10)
        return real(secret, label, salt, associated)

    monkeypatch.setattr(aead, "derive", slow)
    with ThreadPoolExecutor(1) as pool:
        deriving = pool.submit(derive, key)
        inside.wait(10)
        key.destroy()
        go_on.set()
        assert deriving.result() == right
    with pytest.raises(KeyGoneError):
        derive(key)


def test_a_key_shows_nothing_of_itself() -> None:
    key = make_key("k", b"\xaa" * 32)
    assert "aa" not in repr(key)
    assert "\\xaa" not in repr(key)


# --- Single flight --------------------------------------------------------------------------------


def test_many_threads_that_miss_one_key_fetch_it_once() -> None:
    cache, calls = make_cache(), []
    start = threading.Barrier(8)
    all_waiting = threading.Event()

    def fetch(names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        calls.append(list(names))
        all_waiting.wait(0.2)
        return fetch_all(names)

    def work() -> DataKey:
        start.wait()
        return cache.load(["k"], fetch)["k"]

    with ThreadPoolExecutor(8) as pool:
        keys = [future.result() for future in [pool.submit(work) for _ in range(8)]]
    assert calls == [["k"]]
    assert len({id(key) for key in keys}) == 1


def test_a_failed_fetch_is_told_to_all_who_wait_and_is_not_remembered() -> None:
    cache, calls = make_cache(), []
    start = threading.Barrier(4)

    def fail(names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        calls.append(names)
        threading.Event().wait(0.1)
        raise VaultUnavailableError("down")

    def work() -> None:
        start.wait()
        with pytest.raises(VaultUnavailableError):
            cache.load(["k"], fail)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert len(calls) <= 4
    assert cache.get("k") is None
    assert cache.load(["k"], fetch_all)["k"].key_id == "k"


def test_a_thread_that_is_ended_does_not_end_those_who_wait_for_it() -> None:
    cache = make_cache()
    inside = threading.Event()

    def ended(_names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        inside.set()
        threading.Event().wait(0.1)
        raise KeyboardInterrupt

    def leader() -> None:
        with pytest.raises(KeyboardInterrupt):
            cache.load(["k"], ended)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(leader)
        inside.wait(10)
        second = pool.submit(cache.load, ["k"], fetch_all)
        first.result()
        assert second.result()["k"].key_id == "k"


def test_two_batches_that_overlap_do_not_wait_for_each_other_for_ever() -> None:
    cache = make_cache()
    start = threading.Barrier(2)

    def work(names: list[KeyName]) -> set[KeyName]:
        start.wait()
        return set(cache.load(names, fetch_all))

    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            cache.empty()
            one = pool.submit(work, ["a", "b", "c"])
            two = pool.submit(work, ["c", "b", "d"])
            assert one.result(10) == {"a", "b", "c"}
            assert two.result(10) == {"b", "c", "d"}


def test_what_was_fetched_while_the_cache_was_emptied_is_not_kept() -> None:
    """An erasure between the read of a row and its arrival here must win."""
    cache = make_cache()
    first: list[DataKey] = []

    def fetch(names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        if first:
            return {}  # the row is gone now
        first.append(make_key("k"))
        cache.empty()
        return {"k": first[0]}

    assert cache.load(["k"], fetch) == {}
    assert cache.get("k") is None
    assert first[0]._hash is None


def test_a_cache_that_is_emptied_without_pause_is_an_error_not_a_hang() -> None:
    cache = make_cache()

    def fetch(names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        cache.empty()
        return fetch_all(names)

    with pytest.raises(KeyTableError):
        cache.load(["k"], fetch)


class Interrupting(str):
    """A name at whose second look-up the thread is interrupted."""

    __slots__ = ("looked_up",)

    def __hash__(self) -> int:
        self.looked_up = getattr(self, "looked_up", 0) + 1
        if self.looked_up == 2:
            raise KeyboardInterrupt
        return super().__hash__()

    __eq__ = str.__eq__


def test_a_thread_interrupted_while_it_claims_keys_leaves_nobody_waiting() -> None:
    cache = make_cache()
    with pytest.raises(KeyboardInterrupt):
        cache.load(["k", Interrupting("later")], fetch_all)
    found: list[DataKey] = []
    waiter = threading.Thread(
        target=lambda: found.append(cache.load(["k"], fetch_all)["k"]), daemon=True
    )
    waiter.start()
    waiter.join(10)
    assert found, "the flight of the interrupted thread is still waited for"


def test_an_error_about_one_key_of_a_batch_is_not_told_to_who_waits_for_another() -> None:
    cache = make_cache()
    inside, go_on = threading.Event(), threading.Event()

    def fail(_names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        inside.set()
        go_on.wait(10)
        raise VaultRejectedError("the other one does not open")

    with ThreadPoolExecutor(2) as pool:
        batch = pool.submit(cache.load, ["broken", "k"], fail)
        inside.wait(10)
        waiting = pool.submit(cache.load, ["k"], fetch_all)
        threading.Event().wait(0.05)
        go_on.set()
        assert waiting.result(10)["k"].key_id == "k"
        with pytest.raises(VaultRejectedError):
            batch.result(10)


def test_an_old_copy_does_not_take_the_place_of_a_fresh_one() -> None:
    """A key read by id long ago is asked for by its owner: what comes must be the new copy."""
    clock = FakeClock()
    cache = make_cache(clock, max_age_s=300.0)
    old = cache.load(["a"], fetch_all)["a"]
    clock.advance(300)
    fresh = cache.load([owner_of("a")], fetch_all)[owner_of("a")]
    assert fresh is not old
    assert cache.get("a") is fresh


# --- Sealing keys ---------------------------------------------------------------------------------


def test_finds_the_sealing_key_by_owner_until_it_is_forgotten() -> None:
    cache = make_cache()
    key = cache.load([owner_of("a")], fetch_all)[owner_of("a")]
    assert cache.get(owner_of("a")) is key
    assert cache.get("a") is key
    cache.forget_sealing(key)
    assert cache.get(owner_of("a")) is None
    assert cache.get("a") is key


def test_a_key_loaded_by_id_is_not_taken_for_the_newest() -> None:
    cache = make_cache()
    cache.load(["a"], fetch_all)
    assert cache.get(owner_of("a")) is None


# --- Budget ---------------------------------------------------------------------------------------


def test_a_budget_gives_no_more_than_it_has_to_any_number_of_threads() -> None:
    budget = SealBudget(1000)

    def work() -> int:
        taken = 0
        try:
            while True:
                budget.take()
                taken += 1
        except KeyExhaustedError:
            return taken

    with ThreadPoolExecutor(8) as pool:
        taken = sum(future.result() for future in [pool.submit(work) for _ in range(8)])
    assert taken == 1000
