"""Why a record was opened in an emergency: sealed, in the directory, under the patient's own key.

A reason tells of a patient's state. Erasing the patient destroys his key, and with it every reason
that was written about him, in every backup as well. Before: `gateway.identity.grants`.
"""

from __future__ import annotations

from typing import Final, Protocol

from gateway.core.questions import patient_reference
from gateway.identity.shared_secret import SharedSecret
from keys.errors import KeysError
from keys.sealed import PREFIX

_SERVICE: Final = "identity"


class PersonSealer(Protocol):
    """Seals under keys of persons (`gateway.protection.PersonSeals`). May block."""

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        """Raises a `KeysError`."""
        ...

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        """Raises a `KeysError`."""
        ...


class Reasons:
    """Seals and opens reasons. Each is bound to its grant, account and patient. Thread-safe."""

    def __init__(self, sealer: PersonSealer, *, before: SharedSecret) -> None:
        """`before` opens reasons that were sealed when one key was for all of them."""
        self._sealer = sealer
        self._before = before

    def seal(self, reason: str, *, grant: str, account: str, patient: str) -> str:
        """Raises a `KeysError`."""
        return self._sealer.seal(
            person=patient_reference(patient),
            service=_SERVICE,
            field=_field(grant, account),
            plaintext=reason.encode(),
        )

    def unseal(self, text: str, *, grant: str, account: str, patient: str) -> str:
        """The reason; empty, which no rule accepts, if the patient was erased or keys are away."""
        if not text.startswith(PREFIX):
            return self._before.unseal("reason", text, grant, account, patient) or ""
        try:
            return self._sealer.unseal(
                person=patient_reference(patient),
                service=_SERVICE,
                field=_field(grant, account),
                text=text,
            ).decode()
        except (KeysError, UnicodeDecodeError):
            return ""


def _field(grant: str, account: str) -> str:
    return f"reason/{grant}/{account}"
