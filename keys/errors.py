"""Errors of `keys`, grouped by who must act.

Every error carries a stable `code`, a message that says what was expected, what was found and what
to do next, and `diagnostics()` for logs. None of them ever carries key material, tokens, plaintext
or a person's identity.
"""

from __future__ import annotations


class KeysError(Exception):
    """Anything that `keys` refuses or cannot do.

    No subclass ever means "go on without protection".
    """

    code = "keys.error"
    #: Whether the same call may succeed later without anybody acting.
    retryable = False

    def diagnostics(self) -> dict[str, str | int | float | bool]:
        """What an operator may see and a log may keep: the code and the message, never a secret."""
        return {"code": self.code, "message": str(self), "retryable": self.retryable}


# --- The caller must act -------------------------------------------------------------------------


class InvalidContextError(KeysError):
    """A tenant, person, service or field name that cannot be bound to a sealed text."""

    code = "keys.context_invalid"


class UnsealError(KeysError):
    """A sealed text did not open: wrong key, moved to another field or person, or changed.

    One error for all of these, so that it cannot serve as an oracle (RFC 5116 section 2.2).
    """

    code = "keys.unseal_failed"


class MalformedSealedTextError(UnsealError):
    """The text is not of the sealed form at all."""

    code = "keys.sealed_text_malformed"


class PersonErasedError(KeysError):
    """The key was destroyed on purpose. What it sealed is gone for good."""

    code = "keys.person_erased"


class UnknownPersonError(KeysError):
    """Nobody of that name has a key here: a misspelt name must not look like an erasure."""

    code = "keys.unknown_person"


class UnknownKeyError(KeysError):
    """The key table has no such key.

    It belongs to another installation, or the table was restored.
    """

    code = "keys.unknown_key"


class KeyExhaustedError(KeysError):
    """The key may seal no more (nonce budget).

    A new key version is made by the caller of this package.
    """

    code = "keys.key_exhausted"


class ApprovalError(KeysError):
    """Re-identification without two different authorised persons."""

    code = "keys.approval_refused"


# --- The key server (upstream) is at fault -------------------------------------------------------


class VaultError(KeysError):
    """Vault or OpenBao did not do what was asked."""

    code = "keys.vault"


class VaultUnavailableError(VaultError):
    """No answer.

    Connection refused, time-out, 5xx, or the circuit is open after repeated failures.
    """

    code = "keys.vault_unavailable"
    retryable = True


class VaultSealedError(VaultUnavailableError):
    """The server answers but is sealed."""

    code = "keys.vault_sealed"


class VaultThrottledError(VaultUnavailableError):
    """The server answered 429, a quota."""

    code = "keys.vault_throttled"
    #: What the server asked for in `Retry-After`; 0 where it named no time.
    retry_after_s = 0.0


class VaultDeniedError(VaultError):
    """403 after a fresh login: this role may not do that, or its secret was revoked."""

    code = "keys.vault_denied"


class VaultRejectedError(VaultError):
    """400 or 404: the server understood and refused; repeating changes nothing."""

    code = "keys.vault_rejected"
    #: The HTTP status; 0 where the answer was good but one of its items was refused.
    status = 0
    #: Whether the server itself said that there is nothing at this path.
    absent = False


# --- The operator must act -----------------------------------------------------------------------


class KeyConfigurationError(KeysError):
    """A setting, file or permission is wrong."""

    code = "keys.configuration"


class KeyTableError(KeysError):
    """The key table (SQLite or PostgreSQL) cannot be read or written."""

    code = "keys.table"
    retryable = True


class CertificateError(KeysError):
    """There is no certificate to serve with: none was issued yet, or the last one has expired."""

    code = "keys.certificate"
    retryable = True


class EmbeddedServerError(KeysError):
    """The OpenBao that Havengate starts by itself did not start or stopped."""

    code = "keys.embedded"
