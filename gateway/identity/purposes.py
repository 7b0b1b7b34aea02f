"""The purpose that somebody asks for if the request itself says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from policies.model import PURPOSES, Principal, Purpose

#: In this order, for whoever has several roles.
_BY_ROLE: Final[dict[str, Purpose]] = {
    "clinician": "TREAT", "nurse": "TREAT", "crisis-worker": "TREAT",
    "care-coordinator": "CAREMGT", "billing": "HPAYMT", "front-desk": "HOPERAT",
    "records-officer": "PATRQT", "quality": "HOPERAT", "researcher": "HRESCH",
    "ethics-board": "HOPERAT", "site-officer": "HOPERAT", "security-officer": "HOPERAT",
    "administrator": "HSYSADMIN", "moderator": "HOPERAT",
    "staff": "HOPERAT",
}  # fmt: skip


def default_purpose(principal: Principal, configured: Mapping[str, Purpose]) -> Purpose:
    """The configured purpose of a role, else the built-in one.

    A person without a role asks as the patient that he is; a program for the first of its purposes
    in the order of the vocabulary.
    """
    for table in (configured, _BY_ROLE):
        order = [role for role in _BY_ROLE if role in principal.roles]
        order += sorted(principal.roles.difference(_BY_ROLE))
        for role in order:
            if role in table:
                return table[role]
    if principal.kind == "service":
        return next((one for one in PURPOSES if one in principal.purposes), "TREAT")
    return "PATRQT"
