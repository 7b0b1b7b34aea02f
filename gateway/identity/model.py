"""What identification yields.

`policies.model.Principal` is what rules see; here stands what the gateway needs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from policies.model import BreakGlass, Principal, Purpose

Means = Literal["session", "bearer", "service", "anonymous", "proxy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """A principal and how he was recognised.

    `person` is the stable name under which the log and the keys know him (`Practitioner/7`,
    `Patient/3`, or `account/<id>`): erasing it makes every entry about him blind. `role` is the one
    that the log shows. `purpose` is what he asks for if the request itself says nothing else.
    `claims` go into the signed statement that the app receives. `session` names the session, if
    any, so that it can be ended; it is no secret and no token.
    """

    principal: Principal
    means: Means
    person: str = field(repr=False)
    purpose: Purpose
    role: str | None = None
    client: str = ""
    session: str | None = field(default=None, repr=False)
    break_glass: BreakGlass | None = field(default=None, repr=False)
    claims: dict[str, str | list[str]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotIdentified:
    """Nobody is known. `reason` is a code for the log; `challenge` a `WWW-Authenticate` value.

    `credentials_given`: something was shown and refused, which differs from nothing shown.
    """

    reason: Literal[
        "no_credentials", "bad_token", "expired_token", "revoked", "ambiguous", "cross_site"
    ]
    challenge: str = 'Bearer realm="havengate"'
    credentials_given: bool = False
