"""What `havengate check` and `/readyz` say: one line for each thing that must be right."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at. `says` is one line: how it is or, if it is not good, what to do."""

    what: str
    good: bool
    says: str

    def as_dict(self) -> dict[str, object]:
        """For scripts."""
        return asdict(self)
