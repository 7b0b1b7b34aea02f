"""Retries and the circuit breaker, played on a clock that only the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import (
    VaultDeniedError,
    VaultError,
    VaultRejectedError,
    VaultThrottledError,
    VaultUnavailableError,
)
from keys.resilience import Caller, CircuitBreaker, RetryPolicy


@dataclass
class FakeTime:
    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now += pause_s


def new_caller(time: FakeTime, *, uniform: float = 1.0, failures: int = 100) -> Caller:
    return Caller(
        policy=RetryPolicy(attempts=4, deadline_s=8.0, attempt_timeout_s=2.0),
        breaker=CircuitBreaker(failures=failures, open_s=2.0, clock=time.clock),
        clock=time.clock,
        sleep=time.sleep,
        uniform=lambda: uniform,
    )


def failing(
    time: FakeTime, *, took_s: float, error: Callable[[], VaultError]
) -> tuple[Callable[[float], str], list[float]]:
    calls: list[float] = []

    def attempt(timeout_s: float) -> str:
        calls.append(timeout_s)
        time.now += min(took_s, timeout_s)
        raise error()

    return attempt, calls


def test_returns_the_first_good_answer() -> None:
    time = FakeTime()
    caller = new_caller(time)
    answers = iter([VaultUnavailableError("away"), None])

    def attempt(_: float) -> str:
        if error := next(answers):
            raise error
        return "good"

    assert caller.run(attempt, deadline=caller.deadline()) == "good"
    assert len(time.pauses) == 1


@given(
    took_s=st.floats(0, 10), uniform=st.floats(0, 1, exclude_max=True), attempts=st.integers(1, 9)
)
def test_never_outlasts_the_deadline_nor_the_attempts(
    took_s: float, uniform: float, attempts: int
) -> None:
    time = FakeTime()
    caller = Caller(
        policy=RetryPolicy(attempts=attempts, deadline_s=8.0, attempt_timeout_s=2.0),
        breaker=CircuitBreaker(failures=1000, open_s=2.0, clock=time.clock),
        clock=time.clock,
        sleep=time.sleep,
        uniform=lambda: uniform,
    )
    attempt, calls = failing(time, took_s=took_s, error=lambda: VaultUnavailableError("away"))
    with pytest.raises(VaultUnavailableError):
        caller.run(attempt, deadline=caller.deadline())
    assert time.now <= 8.0 + 1e-9
    assert 1 <= len(calls) <= attempts


@given(failed=st.integers(1, 10_000), uniform=st.floats(0, 1, exclude_max=True))
def test_pauses_are_jittered_over_a_bounded_doubling(failed: int, uniform: float) -> None:
    policy = RetryPolicy(attempts=4, deadline_s=8.0, attempt_timeout_s=2.0)
    pause_s = policy.pause_s(failed, uniform=uniform)
    assert (
        0 <= pause_s <= min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** min(failed, 40))
    )


@pytest.mark.parametrize("error", [VaultDeniedError, VaultRejectedError])
def test_never_repeats_what_repeating_cannot_mend(error: type[VaultError]) -> None:
    time = FakeTime()
    caller = new_caller(time)
    attempt, calls = failing(time, took_s=0, error=lambda: error("no"))
    with pytest.raises(error):
        caller.run(attempt, deadline=caller.deadline())
    assert len(calls) == 1


def test_never_repeats_a_call_that_is_not_idempotent() -> None:
    time = FakeTime()
    caller = new_caller(time)
    attempt, calls = failing(time, took_s=0, error=lambda: VaultUnavailableError("away"))
    with pytest.raises(VaultUnavailableError):
        caller.run(attempt, deadline=caller.deadline(), idempotent=False)
    assert len(calls) == 1


def throttled(retry_after_s: float) -> VaultThrottledError:
    error = VaultThrottledError("slower")
    error.retry_after_s = retry_after_s
    return error


def test_waits_as_long_as_the_server_asks() -> None:
    time = FakeTime()
    caller = new_caller(time)
    attempt, calls = failing(time, took_s=0, error=lambda: throttled(2.5))
    with pytest.raises(VaultThrottledError):
        caller.run(attempt, deadline=caller.deadline())
    assert time.pauses == [2.5, 2.5, 2.5]
    assert len(calls) == 4


def test_gives_up_at_once_when_the_server_asks_for_more_time_than_there_is() -> None:
    time = FakeTime()
    caller = new_caller(time)
    attempt, calls = failing(time, took_s=0, error=lambda: throttled(60))
    with pytest.raises(VaultThrottledError):
        caller.run(attempt, deadline=caller.deadline())
    assert (len(calls), time.now) == (1, 0.0)


def test_throttling_never_opens_the_circuit() -> None:
    time = FakeTime()
    caller = new_caller(time, failures=1)
    attempt, _ = failing(time, took_s=0, error=lambda: throttled(0))
    with pytest.raises(VaultThrottledError):
        caller.run(attempt, deadline=caller.deadline())
    assert caller.breaker.state == "closed"


def test_fails_without_a_call_while_the_circuit_is_open() -> None:
    time = FakeTime()
    caller = new_caller(time, failures=3)
    attempt, calls = failing(time, took_s=0, error=lambda: VaultUnavailableError("away"))
    for _ in range(5):
        with pytest.raises(VaultUnavailableError):
            caller.run(attempt, deadline=caller.deadline())
    assert len(calls) == 3
    assert caller.breaker.state == "open"


def open_breaker(time: FakeTime) -> CircuitBreaker:
    breaker = CircuitBreaker(failures=1, open_s=2.0, clock=time.clock)
    breaker.failed(breaker.admit())
    return breaker


def test_only_one_probe_is_let_through() -> None:
    time = FakeTime()
    breaker = open_breaker(time)
    time.now = 2.0
    breaker.admit()
    assert breaker.state == "half-open"
    for _ in range(3):
        with pytest.raises(VaultUnavailableError):
            breaker.admit()


def test_probes_of_many_threads_are_one() -> None:
    time = FakeTime()
    breaker = open_breaker(time)
    time.now = 2.0
    barrier = threading.Barrier(16)
    admitted: list[int] = []

    def probe() -> None:
        barrier.wait()
        with suppress(VaultUnavailableError):
            admitted.append(breaker.admit())

    threads = [threading.Thread(target=probe) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 1


def test_a_good_probe_closes_the_circuit() -> None:
    time = FakeTime()
    breaker = open_breaker(time)
    time.now = 2.0
    breaker.succeeded(breaker.admit())
    assert breaker.state == "closed"


def test_a_failed_probe_opens_the_circuit_again_for_the_whole_time() -> None:
    time = FakeTime()
    breaker = open_breaker(time)
    time.now = 2.0
    breaker.failed(breaker.admit())
    time.now = 3.9
    with pytest.raises(VaultUnavailableError):
        breaker.admit()
    time.now = 4.0
    breaker.admit()


def test_a_probe_that_never_returns_does_not_block_the_next() -> None:
    time = FakeTime()
    breaker = open_breaker(time)
    time.now = 2.0
    breaker.admit()
    time.now = 4.0
    breaker.succeeded(breaker.admit())
    assert breaker.state == "closed"


def test_a_server_that_answers_more_slowly_than_probes_are_sent_closes_the_circuit() -> None:
    time = FakeTime()
    breaker = open_breaker(time)
    time.now = 2.0
    first = breaker.admit()
    time.now = 4.0
    breaker.admit()
    breaker.succeeded(first)
    assert breaker.state == "closed"


def test_an_answer_from_before_the_circuit_opened_does_not_close_it() -> None:
    time = FakeTime()
    breaker = CircuitBreaker(failures=1, open_s=2.0, clock=time.clock)
    slow = breaker.admit()
    breaker.failed(breaker.admit())
    breaker.succeeded(slow)
    assert breaker.state == "open"


@given(outcomes=st.lists(st.booleans(), max_size=40), failures=st.integers(1, 5))
def test_opens_exactly_after_so_many_failures_in_a_row(outcomes: list[bool], failures: int) -> None:
    time = FakeTime()
    breaker = CircuitBreaker(failures=failures, open_s=2.0, clock=time.clock)
    in_a_row = 0
    for good in outcomes:
        ticket = breaker.admit()
        (breaker.succeeded if good else breaker.failed)(ticket)
        in_a_row = 0 if good else in_a_row + 1
        assert (breaker.state == "open") == (in_a_row >= failures)
        if in_a_row >= failures:
            break
