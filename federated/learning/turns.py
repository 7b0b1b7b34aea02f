"""People who come and go: each brings a new update in turn, and sends it on in the rounds after it.

Lives here: what is declared of it, and whose turn a round is. It is matrix-factorisation DP-FTRL
(`factorisation`): a person's update counts in the round of their turn and, falling, in those after
it, so that the noise of successive rounds cancels in their running sum.

A turn comes once in `gap` rounds, in the same place of each `gap`: that is an HMAC of a name which
the node alone knows and which lives as long as the node's key in the roster, keyed by the study's
id. So a device need not remember in which rounds it brought something, not even over an erased
store: a node answers a round's number once, in whatever run (`node.budget`), and the number and the
name alone say whether a new update is due. Whoever is away on their turn has the next one; nothing
is made up for.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from federated.errors import ManifestError
from federated.learning.factorisation import Factors, Participation

_DOMAIN: Final = b"havengate/turn/v1\n"
_DRAWN_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A new update of each person once in `gap` rounds; `factors` as `Factors.coefficients`."""

    gap: int
    factors: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises `ManifestError` for turns that never come, or factors that are none."""
        if self.gap < 1:
            raise ManifestError(f"A turn comes once in 1 round or more, not in {self.gap}.")
        Factors(coefficients=self.factors)

    @property
    def correlation(self) -> Factors:
        """The factors, as the rest of `learning` uses them."""
        return Factors(coefficients=self.factors)

    def participation(self, rounds: int) -> Participation:
        """How often one person's new updates may enter: a turn in each `gap` rounds."""
        return Participation(rounds=rounds, most=-(-rounds // self.gap), gap=self.gap)

    def has_turn(self, *, study: str, tag: str, index: int) -> bool:
        """Whether the person brings a new update in this round of the question, counted from 0.

        `study` is the study's id, `tag` names the person. It depends on nothing else.
        """
        key = sha256(_DOMAIN + study.encode()).digest()
        drawn = hmac.digest(key, tag.encode(), "sha256")[:_DRAWN_BYTES]
        return index % self.gap == int.from_bytes(drawn) % self.gap
