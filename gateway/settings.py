"""The `[gateway]` section of the configuration file.

Secrets never stand in the file: it names files that hold them. Relative paths are relative to the
configuration file. Durations and sizes carry their unit in the name.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from keys.settings import Count, DatabaseURL, FilePath, Seconds
from policies.model import Action, Purpose, ServiceKind

Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class FieldSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One protected element of a resource.

    `path` is `Type.element.element` for FHIR (arrays are gone through), and `Type:/json/pointer`
    with `*` for every item of an array otherwise. `seal`: the app keeps only ciphertext. `index`:
    the search parameter by which exact values can be found (blind index). `mask`: nobody sees more
    than that there is a value.
    """

    path: str
    seal: bool = False
    index: str = ""
    mask: bool = False


class RuleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one kind of request to an app that does not speak FHIR is understood.

    `path` is a template below the route's path: `/patients/{patient}/mood/{id}`; `{rest*}` at its
    end takes the rest. The variables `patient`, `id` and `author` mean what they say. Pointers
    (RFC 6901, with `*` for every item) find the same in JSON bodies: `request_…` in what is sent,
    `…` in what comes back. `items` leads to a list whose members are decided one by one; of what
    stands beside it only `total`, made to fit, and what `keep` points to is released. The other
    pointers begin at one member. `request_patient = "?name"` is a parameter of the query.
    `public`: this may be had without signing in, if the rules say so too.
    """

    path: str
    methods: tuple[str, ...] = ("GET", "HEAD")
    type: str
    action: Action | None = None
    patient: str = ""
    author: str = ""
    id: str = ""
    items: str = ""
    total: str = ""
    keep: tuple[str, ...] = ()
    request_patient: str = ""
    codes: tuple[str, ...] = ()
    public: bool = False


class RouteSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One app behind the gateway.

    `host` (empty: any) and `path` (a prefix) choose it; the longest path wins. `upstream` is a URL.
    `content`: `fhir`, `json` (by `rules`), or `opaque`, which passes bodies as they are.
    `patient_facts`: where relations and consents are asked for: `upstream` (FHIR CareTeam and
    Consent of this app), the name of another route, or `none`.
    `patient_consents = "none"`: this FHIR app has no Consent, and no patient can refuse anything
    there; without it an app that cannot be asked is closed to all but patients and emergencies.
    `insecure_upstream`: what goes to the app and back may cross a network unencrypted.
    """

    name: str
    kind: ServiceKind
    upstream: str
    host: str = ""
    path: str = "/"
    strip_path: bool = False
    content: Literal["fhir", "json", "opaque"] = "opaque"
    rules: tuple[RuleSettings, ...] = ()
    fields: tuple[FieldSettings, ...] = ()
    patient_facts: str = ""
    patient_consents: Literal["upstream", "none"] = "upstream"
    insecure_upstream: bool = False
    preserve_host: bool = False
    ca_file: FilePath = ""
    connect_timeout_s: Seconds = 5.0
    timeout_s: Seconds = 30.0
    max_connections: Count = 100


class IdentityProviderSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """An identity provider whose bearer tokens are accepted. Claims are named as it names them."""

    issuer: str
    audience: str
    jwks_url: str = ""
    jwks_file: FilePath = ""
    ca_file: FilePath = ""
    algorithms: tuple[Literal["RS256", "PS256", "ES256", "ES384", "EdDSA"], ...] = (
        "RS256",
        "ES256",
    )
    leeway_s: Annotated[float, msgspec.Meta(ge=0, le=120)] = 30.0
    max_age_s: Seconds = 86_400.0
    roles_claim: str = "roles"
    #: Roles of the provider → roles of the rules. Empty: only names that the rules know count.
    roles: dict[str, str] = {}
    patient_claim: str = "patient"
    fhir_user_claim: str = "fhirUser"
    #: FHIR servers on which an absolute `fhirUser` counts, beside `audience`.
    fhir_bases: tuple[str, ...] = ()
    purpose_claim: str = "purpose_of_use"
    #: Values of `acr` or members of `amr` that stand for a second factor.
    second_factor: tuple[str, ...] = ("mfa", "otp", "hwk")


class ServiceAccountSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A program. `key_hash_file` holds the SHA-256 of its key, as `users add --service` prints."""

    name: str
    key_hash_file: FilePath
    roles: tuple[str, ...] = ("app",)
    scopes: tuple[str, ...] = ()
    purposes: tuple[Purpose, ...] = ("TREAT",)


class SessionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own sessions, with password and second factor."""

    idle_s: Seconds = 1_800.0
    lifetime_s: Seconds = 43_200.0
    #: Failed attempts within `attempts_window_s` after which an account waits (NIST SP 800-63B
    #: section 5.2.2), and per client address.
    attempts: Count = 5
    attempts_per_address: Count = 50
    attempts_window_s: Seconds = 900.0


class IdentitySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may come in, and how."""

    #: SQLAlchemy URL of accounts and sessions.
    database_url: DatabaseURL = "sqlite:///var/gateway.sqlite3"
    providers: tuple[IdentityProviderSettings, ...] = ()
    service_accounts: tuple[ServiceAccountSettings, ...] = ()
    sessions: SessionSettings = SessionSettings()
    #: The purpose that a role asks for if the request says none.
    purposes: dict[str, Purpose] = {}


class DestinationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host that apps may call, and for what. `*.example.org` is every host below it.

    `apps` are the names of those that may; empty: every app of the section may.
    """

    host: str
    port: Port = 443
    purposes: tuple[Purpose, ...]
    apps: tuple[str, ...] = ()


class OutboundAppSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An app that calls out. It shows itself by name and key in its proxy's URL."""

    name: str
    key_hash_file: FilePath
    purpose: Purpose = "TREAT"


class OutboundSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The way out, for apps behind the gateway. Without apps there is none."""

    host: str = "127.0.0.1"
    port: Port = 8481
    apps: tuple[OutboundAppSettings, ...] = ()
    destinations: tuple[DestinationSettings, ...] = ()
    #: The authority that apps must trust is written here.
    directory: FilePath = "var/outbound"
    #: Of the servers called; empty: the usual ones of the system.
    ca_file: FilePath = ""
    max_body_bytes: Count = 16_777_216
    timeout_s: Seconds = 60.0


class TLSSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The certificate shown to clients. Without files one is issued by the key server."""

    certificate_file: FilePath = ""
    key_file: FilePath = ""
    #: Where an issued one is kept.
    directory: FilePath = "var/tls"
    minimum: Literal["1.2", "1.3"] = "1.2"


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on everything that a client or an app can make grow."""

    header_bytes: Count = 32_768
    header_fields: Count = 100
    target_bytes: Count = 8_192
    #: Of a body that is inspected; larger ones are refused.
    inspected_request_bytes: Count = 8_388_608
    inspected_answer_bytes: Count = 33_554_432
    #: Of a body that passes in pieces.
    streamed_bytes: Count = 1_073_741_824
    #: Exchanges at once; further ones are told to come again.
    concurrent: Count = 1_024
    #: Of records that are looked through for one answer (totals, chained searches).
    looked_through: Count = 1_000
    body_timeout_s: Seconds = 60.0


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole section."""

    host: str = "127.0.0.1"
    port: Port = 8443
    #: How people reach the gateway; empty: https://localhost:PORT.
    public_url: str = ""
    #: Health, readiness and metrics, on loopback only.
    admin_port: Port = 8444
    workers: Count = 1
    tls: TLSSettings = TLSSettings()
    limits: LimitSettings = LimitSettings()
    identity: IdentitySettings = IdentitySettings()
    outbound: OutboundSettings = OutboundSettings()
    routes: tuple[RouteSettings, ...] = ()
