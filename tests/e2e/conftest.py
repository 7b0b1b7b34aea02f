"""One clinic behind its gateway for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.running import Site, running_site

#: Who works at the clinic or is treated there: `examples/clinic/people.py` says who treats whom.
PEOPLE = {
    "adler": ("--role", "clinician", "--role", "staff", "--reference", "Practitioner/1"),
    "brandt": ("--role", "clinician", "--reference", "Practitioner/2"),
    "cruz": ("--role", "clinician", "--reference", "Practitioner/3"),
    "dorn": ("--role", "clinician", "--reference", "Practitioner/4"),
    "office": ("--role", "records-officer", "--reference", "Practitioner/8"),
    "patient-1": ("--patient", "1"),
}


@pytest.fixture(scope="session")
def clinic_gateway() -> Iterator[Site]:
    """The site, running, with accounts for `PEOPLE`. Whoever breaks something mends it."""
    with running_site(workers=2) as site:
        for name, details in PEOPLE.items():
            site.add_account(name, *details)
        yield site
