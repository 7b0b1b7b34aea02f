"""What a FHIR resource says about itself: whose it is, who wrote it, which codes are in it.

Whose it is follows the Patient compartment of FHIR R4 (`gateway.fhir.definitions`), with what it
leaves out added here. Nothing is looked up: a reference that cannot be understood from the resource
alone leaves open whose it is, and the resource is then unresolved, never nobody's.

Before: parsed JSON. After: questions to the rules (`gateway.fhir.handler`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import Any, Final

from gateway.fhir.definitions import compartment_of

type Json = dict[str, Any]

#: FHIR R4 section 2.3.0.1, the reference of the literal form, any type.
_REFERENCE: Final = re.compile(
    r"(?:https?://(?:[A-Za-z0-9\-.:%$_~]+/)+)?([A-Z][A-Za-z]{1,63})/([A-Za-z0-9\-.]{1,64})"
    r"(?:/_history/[A-Za-z0-9\-.]{1,64})?",
    re.ASCII,
).fullmatch
_CONDITIONAL: Final = re.compile(r"([A-Z][A-Za-z]{1,63})\?\S+", re.ASCII).fullmatch

#: Types that describe the house, its people, its goods or its vocabulary, and no patient.
#: Everything else belongs to a patient, types that are not known included.
_DIRECTORY: Final = (
    "Organization OrganizationAffiliation Practitioner PractitionerRole Location Endpoint "
    "HealthcareService InsurancePlan Schedule Slot Medication MedicationKnowledge Substance "
    "DeviceDefinition DeviceMetric CatalogEntry"
)
_DEFINITIONS: Final = (
    "ActivityDefinition ChargeItemDefinition EventDefinition Library Measure ObservationDefinition "
    "PlanDefinition Questionnaire SpecimenDefinition ResearchDefinition ResearchElementDefinition "
    "ResearchStudy Evidence EvidenceVariable EffectEvidenceSynthesis RiskEvidenceSynthesis"
)
_VOCABULARY: Final = (
    "CapabilityStatement CodeSystem CompartmentDefinition ConceptMap ExampleScenario "
    "GraphDefinition ImplementationGuide MessageDefinition NamingSystem OperationDefinition "
    "OperationOutcome SearchParameter StructureDefinition StructureMap TerminologyCapabilities "
    "TestScript ValueSet"
)
_PRODUCTS: Final = (
    "MedicinalProduct MedicinalProductAuthorization MedicinalProductContraindication "
    "MedicinalProductIndication MedicinalProductIngredient MedicinalProductInteraction "
    "MedicinalProductManufactured MedicinalProductPackaged MedicinalProductPharmaceutical "
    "MedicinalProductUndesirableEffect SubstanceNucleicAcid SubstancePolymer SubstanceProtein "
    "SubstanceReferenceInformation SubstanceSourceMaterial SubstanceSpecification"
)
_NOT_PATIENT_TYPES: Final = frozenset(
    f"{_DIRECTORY} {_DEFINITIONS} {_VOCABULARY} {_PRODUCTS}".split()
)

#: Patients of types that the compartment leaves out although they may be about one.
_BESIDE_THE_COMPARTMENT: Final[dict[str, tuple[str, ...]]] = {
    "Binary": ("Binary.securityContext",),
    "Contract": ("Contract.subject",),
    "Device": ("Device.patient",),
    "GuidanceResponse": ("GuidanceResponse.subject",),
}
_ANY_TYPE: Final = ("subject", "patient")
#: Elements that say whose a resource is. Others of the compartment add patients to it.
_OWNERS: Final = frozenset({"subject", "patient", "for", "beneficiary", "candidate", "individual"})

#: Elements that say who wrote or stated what is in a resource (FHIR R4, W5 mapping `FiveWs.author`,
#: `FiveWs.actor` for what is itself a result). Who merely took part is not among them.
_AUTHORS: Final[dict[str, tuple[str, ...]]] = {
    "AdverseEvent": ("recorder",),
    "AllergyIntolerance": ("recorder", "asserter"),
    "Basic": ("author",),
    "CarePlan": ("author",),
    "ChargeItem": ("enterer",),
    "Claim": ("enterer",),
    "ClinicalImpression": ("assessor",),
    "Communication": ("sender",),
    "CommunicationRequest": ("requester", "sender"),
    "Composition": ("author",),
    "Condition": ("recorder", "asserter"),
    "Consent": ("performer",),
    "DetectedIssue": ("author",),
    "DeviceRequest": ("requester",),
    "DeviceUseStatement": ("source",),
    "DiagnosticReport": ("performer", "resultsInterpreter"),
    "DocumentManifest": ("author",),
    "DocumentReference": ("author",),
    "Flag": ("author",),
    "Goal": ("expressedBy",),
    "Immunization": ("performer.actor",),
    "List": ("source",),
    "Media": ("operator",),
    "MedicationAdministration": ("performer.actor",),
    "MedicationRequest": ("requester", "recorder"),
    "MedicationStatement": ("informationSource",),
    "MessageHeader": ("author",),
    "NutritionOrder": ("orderer",),
    "Observation": ("performer",),
    "Procedure": ("recorder", "asserter", "performer.actor"),
    "QuestionnaireResponse": ("author",),
    "RequestGroup": ("author",),
    "RiskAssessment": ("performer",),
    "ServiceRequest": ("requester",),
    "SupplyRequest": ("requester",),
    "Task": ("requester",),
    "VisionPrescription": ("prescriber",),
}


class _Target(Enum):
    """Where a reference leads if not to a patient whose id is known."""

    ELSEWHERE = "not to a patient"
    NOWHERE = "it is no literal reference and does not claim to be a patient"
    GROUP = "to several persons who are not named here"
    UNKNOWN = "it may be a patient"


def patients_of(resource: Json) -> frozenset[str]:
    """Ids, without type, of all patients that a resource is about.

    A Patient is about itself (a linked Patient is another record). Of an absolute reference only
    type and id count: a reference into another server looks like one to this one's patient of the
    same id. Contained patients, groups and conditional references give no id: see `unresolved`.
    """
    resource_type = resource.get("resourceType")
    if resource_type == "Patient":
        own = resource.get("id")
        return frozenset({own}) if isinstance(own, str) and own else frozenset()
    return frozenset(
        target
        for _, reference in _references(resource)
        if isinstance(target := _target(reference, resource), str)
    )


def unresolved(resource: Json) -> bool:
    """Whether it may belong to a patient, but not all whom it belongs to can be told.

    True for a patient type without any known patient, for an owner (subject, patient, …) that is a
    group, contained, only described, or malformed, and for any other reference of the compartment
    that may lead to a patient.
    """
    return ownership(resource)[1]


def ownership(resource: Json) -> tuple[frozenset[str], bool]:
    """`patients_of` and `unresolved` in one pass."""
    resource_type = resource.get("resourceType")
    if not isinstance(resource_type, str):
        return frozenset(), True
    if resource_type == "Patient":
        patients = patients_of(resource)
        return patients, not patients
    found: set[str] = set()
    open_ = False
    for owner, reference in _references(resource):
        target = _target(reference, resource)
        if isinstance(target, str):
            found.add(target)
        elif target is _Target.UNKNOWN or (
            owner and (target is _Target.GROUP or target is _Target.NOWHERE)
        ):
            open_ = True
    return frozenset(found), open_ or (not found and is_patient_type(resource_type))


def is_patient_type(resource_type: str) -> bool:
    """Whether a resource of this type needs a known patient to be written or released.

    All types of the Patient compartment but Schedule, whose actor is mostly no patient (if it is
    one, `patients_of` says so), everything else that may be about a person, and unknown types.
    """
    return resource_type not in _NOT_PATIENT_TYPES


def authors_of(resource: Json) -> frozenset[str]:
    """References (`Practitioner/7`) of who wrote it. What cannot be understood names no author."""
    paths = _AUTHORS.get(str(resource.get("resourceType")), ())
    return frozenset(
        "/".join(target)
        for path in paths
        for reference in _values(resource, path.split("."))
        if isinstance(reference, dict)
        and isinstance(literal := reference.get("reference"), str)
        and (target := reference_target(literal)) is not None
    )


def codes_of(resource: Json) -> frozenset[tuple[str, str]]:
    """All codings in it, contained resources included; the system is empty if none is given.

    A quantity's unit is no coding.
    """
    found: set[tuple[str, str]] = set()
    stack: list[object] = [resource]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            code, system = value.get("code"), value.get("system", "")
            if isinstance(code, str) and isinstance(system, str) and "value" not in value:
                found.add((system, code))
            stack += [item for item in value.values() if isinstance(item, dict | list)]
    return frozenset(found)


def reference_target(reference: str) -> tuple[str, str] | None:
    """Type and id that a literal reference leads to: relative, absolute or versioned.

    None for everything else: contained (`#x`), `urn:`, conditional, malformed.
    """
    parts = _REFERENCE(reference)
    return (parts[1], parts[2]) if parts else None


def owner_paths(resource_type: str) -> tuple[str, ...]:
    """Paths of the references that `patients_of` reads in a resource of this type."""
    return (
        compartment_of(resource_type)
        or _BESIDE_THE_COMPARTMENT.get(resource_type)
        or tuple(f"{resource_type}.{name}" for name in _ANY_TYPE)
    )


def _references(resource: Json) -> Iterator[tuple[bool, object]]:
    """What stands where the compartment looks, and whether it says whose the resource is."""
    resource_type = resource.get("resourceType")
    if not isinstance(resource_type, str):
        return
    for owner, first, rest in _places(resource_type):
        found = resource.get(first)
        if found is None:
            continue
        if isinstance(found, dict) and not rest:
            yield owner, found
            continue
        for value in _values(found, rest):
            yield owner, value


# Types of resources come from the app, so that not all of them are kept.
@lru_cache(maxsize=512)
def _places(resource_type: str) -> tuple[tuple[bool, str, list[str]], ...]:
    """Whether a reference says whose it is, the element it stands in, and the way from there."""
    ways = [path.split(".")[1:] for path in owner_paths(resource_type)]
    return tuple((names[0] in _OWNERS and len(names) == 1, names[0], names[1:]) for names in ways)


def _values(value: object, names: list[str]) -> Iterator[object]:
    """Everything at a path, arrays gone through. Absent elements and nulls give nothing."""
    if isinstance(value, list):
        for item in value:
            # A list in a list is no FHIR: it is handed on as it is and understood by nobody.
            yield from [item] if isinstance(item, list) else _values(item, names)
    elif not names:
        if value is not None:
            yield value
    elif isinstance(value, dict):
        yield from _values(value.get(names[0]), names[1:])


def _target(reference: object, resource: Json) -> str | _Target:
    """The id of the patient to whom a Reference leads, or what else can be said."""
    if not isinstance(reference, dict):
        return _Target.UNKNOWN
    literal = reference.get("reference")
    if literal is None:
        claimed = reference.get("type")
        return _Target.UNKNOWN if claimed == "Patient" else _Target.NOWHERE
    if not isinstance(literal, str):
        return _Target.UNKNOWN
    found = reference_target(literal)
    if found is not None and found[0] == "Patient":
        return found[1]
    return _kind_of_target(_type_of(literal, found, resource))


def _type_of(literal: str, found: tuple[str, str] | None, resource: Json) -> str | None:
    if found is not None:
        return found[0]
    if literal.startswith("#"):
        contained = resource.get("contained")
        for one in contained if isinstance(contained, list) else ():
            if isinstance(one, dict) and one.get("id") == literal[1:]:
                inner = one.get("resourceType")
                return inner if isinstance(inner, str) else None
        return None
    conditional = _CONDITIONAL(literal)
    return conditional[1] if conditional else None


def _kind_of_target(resource_type: str | None) -> _Target:
    if resource_type is None or resource_type == "Patient":
        return _Target.UNKNOWN
    return _Target.GROUP if resource_type == "Group" else _Target.ELSEWHERE
