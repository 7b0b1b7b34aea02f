"""The `[keys]` section of the configuration file.

Secrets never stand in the file: it names files that hold them. Relative paths are relative to the
configuration file. Durations carry their unit in the name.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

#: A path; a relative one is relative to the configuration file.
FilePath = Annotated[str, msgspec.Meta(extra={"located": "path"})]
#: An SQLAlchemy URL; the path in a `sqlite:///…` one is relative to the configuration file.
DatabaseURL = Annotated[str, msgspec.Meta(extra={"located": "url"})]

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]

RoleName = Literal["gateway", "audit", "operator", "node", "coordinator"]


class RoleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one AppRole's credentials lie: files of mode 0600 that hold the id, nothing else."""

    role_id_file: FilePath
    secret_id_file: FilePath


class VaultSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HashiCorp Vault or OpenBao server.

    Without an address, and without `VAULT_ADDR` in the environment, Havengate starts the OpenBao
    that it brings (see `EmbeddedSettings`).
    """

    address: str = ""
    ca_file: FilePath = ""
    namespace: str = ""
    #: All mounts, policies and roles of Havengate carry this prefix, so a server can be shared.
    prefix: str = "havengate"
    roles: dict[RoleName, RoleSettings] = {}
    timeout_s: Seconds = 2.0
    #: A call is tried at most this often, with exponential back-off and jitter, within
    #: `deadline_s`.
    attempts: Count = 4
    deadline_s: Seconds = 8.0
    #: After this many failures in a row the circuit opens: calls fail at once for `breaker_open_s`.
    breaker_failures: Count = 5
    breaker_open_s: Seconds = 2.0


class EmbeddedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenBao that Havengate starts by itself, for one machine."""

    directory: FilePath = "var/openbao"
    start_timeout_s: Seconds = 30.0


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data keys in memory.

    `refresh_s` bounds how long another process may go on using an erased key; what it seals in that
    time is lost with the key.
    """

    max_age_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 300.0
    max_entries: Count = 10_000
    max_uses: Count = 1_000_000
    refresh_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0


class EpochSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Life of a key-encryption-key epoch.

    An erased person's wrapped key is dead in every backup once the epoch that wrapped it is trimmed
    and no backup of the key server itself is older than that.
    """

    roll_every_days: Count = 90
    trim_after_days: Count = 30
    server_backup_days: Count = 30


class IndexSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Blind index. After a rotation old and new values both match for `window_days`."""

    window_days: Count = 30


class PkiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Certificates for servers and Flower nodes."""

    lifetime_hours: Count = 24
    #: Renewed when less than this fraction of the lifetime is left.
    renew_fraction: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.34
    allowed_domains: tuple[str, ...] = ("localhost", "havengate.internal")


class KeysSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole section."""

    #: SQLAlchemy URL of the key table; `sqlite:///…` or `postgresql+psycopg://…`.
    table_url: DatabaseURL = "sqlite:///var/keys.sqlite3"
    vault: VaultSettings = VaultSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    cache: CacheSettings = CacheSettings()
    epochs: EpochSettings = EpochSettings()
    index: IndexSettings = IndexSettings()
    pki: PkiSettings = PkiSettings()
