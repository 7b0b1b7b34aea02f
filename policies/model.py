"""What a decision is made of: who asks, for what, in which circumstances, and the answer.

Lives here: plain frozen values and the closed vocabularies they draw from. Lives elsewhere: how
they become Cedar entities (`policies.facts`), how an answer is found (`policies.engine`).

The vocabularies of purposes, labels and confidentiality are HL7's: v3 PurposeOfUse, v3 ActCode
(InformationSensitivityPolicy) and v3 Confidentiality, as used by DS4P.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from policies.obligations import Obligation

PrincipalKind = Literal["user", "service", "anonymous"]
ServiceKind = Literal[
    "ehr", "messaging", "telehealth", "mood", "wearable",
    "forum", "crisis", "elearning", "generic", "outbound",
]  # fmt: skip
#: FHIR interactions, `count` (a number about records, no record), and `connect` (a stream, or a
#: call that an app makes to the outside).
Action = Literal[
    "read", "history", "search", "count", "create", "update", "patch", "delete",
    "execute", "export", "disclose", "connect",
]  # fmt: skip
#: What is done to a study that looks at people's data where it lies, before and after it does.
StudyAction = Literal[
    "study-propose", "study-approve", "study-run", "study-release", "study-withdraw"
]
#: In which capacity somebody approves or stops a study.
Capacity = Literal["none", "ethics-board", "site"]
#: HL7 v3 PurposeOfUse. `BTG` is break the glass, `ETREAT` emergency treatment.
Purpose = Literal[
    "TREAT", "CAREMGT", "COORD", "ETREAT", "BTG", "HPAYMT", "HOPERAT", "HSYSADMIN",
    "HRESCH", "PATRQT", "FAMRQT", "PWATRNY", "HLEGAL", "HMARKT", "PUBHLTH", "SUPPORT",
]  # fmt: skip
Confidentiality = Literal["U", "L", "M", "N", "R", "V"]
SecondFactor = Literal["none", "totp", "webauthn", "certificate"]

ACTIONS: Final[tuple[Action, ...]] = get_args(Action)
STUDY_ACTIONS: Final[tuple[StudyAction, ...]] = get_args(StudyAction)
CAPACITIES: Final[tuple[Capacity, ...]] = get_args(Capacity)
PURPOSES: Final[tuple[Purpose, ...]] = get_args(Purpose)
SERVICE_KINDS: Final[tuple[ServiceKind, ...]] = get_args(ServiceKind)
SECOND_FACTORS: Final[tuple[SecondFactor, ...]] = get_args(SecondFactor)
#: From the least to the most protected (v3 Confidentiality).
CONFIDENTIALITY: Final[tuple[Confidentiality, ...]] = get_args(Confidentiality)
#: Sensitivity labels that rules may name.
LABELS: Final = ("PSY", "PSYTHPN", "SUD", "ETHUD", "42CFRPart2", "HIV", "SDV")
#: Roles that the built-in packs know.
ROLES: Final = (
    "clinician", "nurse", "care-coordinator", "front-desk", "billing", "records-officer",
    "quality", "researcher", "ethics-board", "site-officer", "security-officer", "administrator",
    "crisis-worker", "moderator", "staff", "app", "device-ingest",
)  # fmt: skip

RemedyKind = Literal[
    "step_up", "break_glass", "consent", "purpose", "scope", "shorter_grant",
    "records_office", "encrypt", "administrator", "operator",
]  # fmt: skip
REMEDIES: Final[dict[RemedyKind, str]] = {
    "step_up": "Show your second factor again.",
    "break_glass": "Ask for the care team, or ask for break-glass if it cannot wait.",
    "consent": "The patient has not consented to this; ask the patient.",
    "purpose": "Say for which purpose you ask; this one does not cover it.",
    "scope": "The application may not do this for you; sign in to it again with a wider scope.",
    "shorter_grant": "Ask for break-glass again: with a reason, for four hours at most.",
    "records_office": "Ask the records office.",
    "encrypt": "Use an encrypted connection.",
    "administrator": "Ask your administrator whether your role should allow this.",
    "operator": "Something is wrong with the rules or the request; tell the operator.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assurance:
    """How sure we are of who this is. `second_factor_at` is Unix time in seconds."""

    second_factor: SecondFactor = "none"
    second_factor_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks.

    `patient` is the record that is about this person; `represents` and `care_team` are ids of
    patients for whom the person may act or whom he treats. `references` are the ways in which apps
    name this person as an author. `scopes` are SMART v2 scopes; `None` means that nothing limits
    the client, an empty set that it may do nothing. `purposes` are those a service is registered
    for.
    """

    kind: PrincipalKind
    id: str = field(repr=False)
    roles: frozenset[str] = frozenset()
    assurance: Assurance = Assurance()
    patient: str | None = field(default=None, repr=False)
    represents: frozenset[str] = field(default=frozenset(), repr=False)
    care_team: frozenset[str] = field(default=frozenset(), repr=False)
    references: frozenset[str] = field(default=frozenset(), repr=False)
    scopes: frozenset[str] | None = None
    purposes: frozenset[Purpose] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where an app's outbound call goes. `listed_for`: purposes the operator allows it for."""

    host: str
    listed_for: frozenset[Purpose] = frozenset()
    encrypted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStanding:
    """How a study stands, and how the one who asks stands to it.

    `capacity` is the one in which he asks to approve or stop it, `own_site` whether he speaks for
    the site that he asks for. `proposed_by_self`: he proposed it; `spoken_by_self`: he has given
    his word on it, in any capacity. `approved`: everybody whose word it needs has given it.
    """

    capacity: Capacity = "none"
    own_site: bool = False
    proposed_by_self: bool = False
    spoken_by_self: bool = False
    approved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What is asked for. `labels` and `confidentiality` come from `policies.labels`.

    Before an answer has been seen they say what is known from the route; each resource of an
    answer is decided again with its own.
    """

    service: str
    kind: ServiceKind
    type: str
    id: str | None = field(default=None, repr=False)
    patient: str | None = field(default=None, repr=False)
    author: str | None = field(default=None, repr=False)
    labels: frozenset[str] = frozenset()
    confidentiality: Confidentiality = "N"
    destination: Destination | None = None
    study: StudyStanding | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakGlass:
    """A granted emergency access: why, for whom, from when to when (Unix time in seconds)."""

    reason: str = field(repr=False)
    patients: frozenset[str] = field(repr=False)
    begins_at: float
    ends_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsentVerdict:
    """What the patient's consents say to this request (`policies.consent`).

    `authorises` holds the specially protected labels that a permission names expressly.
    `unreadable`: a consent that may concern the request could not be understood.
    """

    permits: bool = False
    denies: bool = False
    unreadable: bool = False
    authorises: frozenset[str] = frozenset()
    consents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The circumstances. `now` is Unix time in seconds; `client` the application that asks."""

    purpose: Purpose
    now: float
    client: str = ""
    break_glass: BreakGlass | None = None
    consent: ConsentVerdict = ConsentVerdict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the rules."""

    principal: Principal
    action: Action | StudyAction
    resource: Resource
    context: Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What the person who was denied can do."""

    kind: RemedyKind

    @property
    def text(self) -> str:
        """One sentence for people."""
        return REMEDIES[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """Yes, provided that every obligation is carried out. `rules` are the ids that said so."""

    obligations: tuple[Obligation, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """No. `rules` is empty when nothing allowed it; `failure` is set if it was not decided.

    `reason` and `remedy` are for the one who asked. `rules` are for the log and for officers: the
    name of a rule can say what is in the record.
    """

    reason: str
    rules: tuple[str, ...]
    remedy: Remedy
    failure: str | None = None


Decision = Allowed | Denied
