"""Bounded retries and the circuit breaker: how patient the key server's clients are.

Here stands only arithmetic and state; no socket is opened. `keys.vault` hands in the attempt as a
function and receives either its result or the last typed error, always within the deadline. Time,
sleeping and randomness are arguments, so that every path can be played in a test without waiting.

Full jitter after M. Brooker, "Exponential Backoff and Jitter" (2015); circuit breaker after M.
Nygard, "Release It!" (2007): closed, open, half-open with a single probe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from keys.errors import VaultThrottledError, VaultUnavailableError

CircuitState = Literal["closed", "open", "half-open"]

#: Less time than this is not worth another attempt: it could only end in a time-out.
_SMALLEST_ATTEMPT_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long one call is tried.

    `attempt_timeout_s` bounds one attempt, `deadline_s` all of them and the pauses between them.
    """

    attempts: int
    deadline_s: float
    attempt_timeout_s: float
    first_pause_s: float = 0.05
    longest_pause_s: float = 1.0

    def pause_s(self, failed_attempts: int, *, uniform: float) -> float:
        """Return the pause after so many failures: a random part of a doubling, bounded ceiling."""
        ceiling_s: float = self.first_pause_s * 2 ** min(failed_attempts - 1, 30)
        return min(self.longest_pause_s, ceiling_s) * uniform


class CircuitBreaker:
    """Fails calls at once while the server is known to be down; one probe at a time finds out.

    Thread-safe. `admit` hands out a ticket that goes back with the outcome, so that a slow call
    from before the circuit opened cannot close it. A probe that is not back after `open_s` does not
    block the next; should it still come back well, the circuit closes, or else a server that takes
    longer than `open_s` would never be used again.
    """

    def __init__(self, *, failures: int, open_s: float, clock: Callable[[], float]) -> None:
        self._failures_allowed = failures
        self._open_s = open_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._generation = 0
        self._opened_at: float | None = None
        self._probe_since: float | None = None

    @property
    def state(self) -> CircuitState:
        """The state now."""
        with self._lock:
            if self._opened_at is None:
                return "closed"
            return "half-open" if self._probing() else "open"

    def admit(self) -> int:
        """Return a ticket for one attempt.

        Raises `VaultUnavailableError` while the circuit is open.
        """
        with self._lock:
            if self._opened_at is None:
                return self._generation
            now = self._clock()
            waited_s = now - self._opened_at
            if waited_s < self._open_s or self._probing():
                raise VaultUnavailableError(
                    f"The key server failed {self._failures} times in a row; calls are refused for "
                    f"up to {self._open_s:g} s before the next probe. See `havengate keys status`."
                )
            self._probe_since = now
            return self._generation

    def succeeded(self, ticket: int) -> None:
        """The server answered, whatever it said: it is there."""
        with self._lock:
            if ticket == self._generation:
                self._failures = 0
                self._opened_at = self._probe_since = None

    def failed(self, ticket: int) -> None:
        """There was no usable answer."""
        with self._lock:
            if ticket != self._generation:
                return
            self._failures += 1
            if self._probe_since is not None or self._failures >= self._failures_allowed:
                self._generation += 1
                self._opened_at = self._clock()
                self._probe_since = None

    def _probing(self) -> bool:
        """Whether a probe is out. One that is not back after `open_s` is taken as lost."""
        return self._probe_since is not None and self._clock() - self._probe_since < self._open_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Runs attempts under a policy and a breaker. `uniform` returns a number in [0, 1)."""

    policy: RetryPolicy
    breaker: CircuitBreaker
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    uniform: Callable[[], float] = field(repr=False)

    def deadline(self) -> float:
        """Return the time by which a call that begins now must have ended."""
        return self.clock() + self.policy.deadline_s

    def run[Result](
        self, attempt: Callable[[float], Result], *, deadline: float, idempotent: bool = True
    ) -> Result:
        """Return the first result of `attempt(timeout_s)`.

        Only errors marked `retryable` are tried again, and only if the call is idempotent:
        repeating one that is not might do it twice. Raises the last error by `deadline`, at once if
        the server asks for a longer pause than there is time, and `VaultUnavailableError` at once
        while the circuit is open.
        """
        failed_attempts = 0
        while True:
            try:
                return self._attempt(attempt, deadline)
            except VaultUnavailableError as error:
                failed_attempts += 1
                last = not idempotent or failed_attempts == self.policy.attempts
                if last or self.breaker.state == "open":
                    raise
                pause_s = self.policy.pause_s(failed_attempts, uniform=self.uniform())
                if isinstance(error, VaultThrottledError):
                    pause_s = max(pause_s, error.retry_after_s)
                if self.clock() + pause_s + _SMALLEST_ATTEMPT_S > deadline:
                    raise
                self.sleep(pause_s)

    def _attempt[Result](self, attempt: Callable[[float], Result], deadline: float) -> Result:
        remaining_s = deadline - self.clock()
        if remaining_s < _SMALLEST_ATTEMPT_S:
            raise VaultUnavailableError(
                f"The call did not end within its deadline of {self.policy.deadline_s:g} s; the "
                "key server answers too slowly."
            )
        ticket = self.breaker.admit()
        try:
            result = attempt(min(self.policy.attempt_timeout_s, remaining_s))
        except VaultThrottledError:
            self.breaker.succeeded(ticket)
            raise
        except VaultUnavailableError:
            self.breaker.failed(ticket)
            raise
        except Exception:
            self.breaker.succeeded(ticket)
            raise
        self.breaker.succeeded(ticket)
        return result
