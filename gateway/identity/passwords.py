"""Passwords: how they are hashed, compared and accepted.

Argon2id with the second recommendation of RFC 9106 section 4 (64 MiB, 3 passes, 4 lanes). A check
for a name that has no account costs the same. NIST SP 800-63B section 5.1.1.2: length counts, the
commonest are refused, nothing is composed by rule, nothing expires.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Final

from argon2 import PasswordHasher, Type
from argon2.exceptions import Argon2Error, InvalidHashError

from gateway.errors import AccountError

MIN_CHARACTERS: Final = 12
MAX_CHARACTERS: Final = 256
#: Each holds 64 MiB while it runs.
_AT_ONCE: Final = 2
#: Fewer different characters than this are a pattern, not a password.
_MIN_DIFFERENT: Final = 5
_COMMON_FILE: Final = Path(__file__).parent / "common_passwords.txt"
_RUNS: Final = ("abcdefghijklmnopqrstuvwxyz", "0123456789", "qwertyuiopasdfghjklzxcvbnm")


def rfc_9106_hasher() -> PasswordHasher:
    """The parameters in use."""
    return PasswordHasher(time_cost=3, memory_cost=65_536, parallelism=4, type=Type.ID)


class Passwords:
    """Hashes and compares in threads of its own, two at once; others wait their turn."""

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or rfc_9106_hasher()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="argon2")
        self._nobody = self._hasher.hash(secrets.token_hex(16))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    async def hash(self, password: str) -> str:
        """The password as it is kept, in PHC form."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.hash_now, password)

    async def matches(self, kept: str | None, password: str) -> bool:
        """Whether this is the password. Without one kept: no, after the same work."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._matches, kept, password)

    def hash_now(self, password: str) -> str:
        """As `hash`, blocking."""
        return self._hasher.hash(_normal(password))

    def outdated(self, kept: str) -> bool:
        """Whether a kept hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(kept)

    def _matches(self, kept: str | None, password: str) -> bool:
        # An endless password would be endless work; the comparison is made all the same.
        shown = _normal(password[: MAX_CHARACTERS + 1])
        try:
            self._hasher.verify(kept or self._nobody, shown)
        except (Argon2Error, InvalidHashError):
            return False
        return kept is not None and len(password) <= MAX_CHARACTERS


def check_new_password(password: str, *, login: str) -> None:
    """Raise `AccountError` unless somebody may choose this password."""
    plain = _normal(password)
    if not MIN_CHARACTERS <= len(plain) <= MAX_CHARACTERS:
        raise AccountError(
            f"expected a password of {MIN_CHARACTERS} to {MAX_CHARACTERS} characters, got "
            f"{len(plain)}; a few words that you can remember are long enough"
        )
    if _is_common(plain, login):
        raise AccountError(
            "expected a password that is hard to guess, got one that is often used, repeats "
            "itself, or holds your name; choose another"
        )


def _normal(password: str) -> str:
    """One form for what looks the same (NIST SP 800-63B section 5.1.1.2)."""
    text = password.encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFKC", text)


def _is_common(password: str, login: str) -> bool:
    folded = password.casefold()
    letters = re.sub(r"[\W_]", "", folded)
    if {folded, letters} & _common() or len(set(folded)) < _MIN_DIFFERENT:
        return True
    # `password1234` is `password` and a run: what is left without them is what must be guessed.
    rest = letters
    for word in {"havengate", *re.split(r"[\W_]+", login.casefold())}:
        if len(word) > len("abc"):
            rest = rest.replace(word, "")
    rest = _without_runs(rest)
    return len(rest) < MIN_CHARACTERS // 2 or rest in _common()


def _without_runs(text: str) -> str:
    """The text without stretches of the alphabet, of digits or of a keyboard, either way."""
    shortest = 4
    for run in (*_RUNS, *(one[::-1] for one in _RUNS)):
        for length in range(len(run), shortest - 1, -1):
            for start in range(len(run) - length + 1):
                text = text.replace(run[start : start + length], "")
    return text


@lru_cache(maxsize=1)
def _common() -> frozenset[str]:
    lines = _COMMON_FILE.read_text(encoding="utf-8").splitlines()
    return frozenset(line.strip() for line in lines if line and not line.startswith("#"))
