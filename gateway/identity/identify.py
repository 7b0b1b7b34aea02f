"""Who asks: one credential, one answer. Session, bearer token or a program's key; never two.

What is shown and wrong is refused even where nothing need be shown, so that nobody mistakes his
ended session for none. Nothing here writes to the log: that an attempt failed stands in the entry
of the exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gateway.core.messages import RequestHead
from gateway.errors import BadRequestError
from gateway.identity.bearer import BearerTokens, Refusal
from gateway.identity.credentials import (
    PURPOSE_HEADER,
    SAFE_METHODS,
    SESSION_COOKIE,
    bearer_token,
    cookies,
    is_same_origin,
)
from gateway.identity.directory import Directory
from gateway.identity.model import Identified, NotIdentified
from gateway.identity.purposes import default_purpose
from gateway.identity.records import SessionView, open_break_glass
from gateway.identity.service_accounts import PREFIX, ServiceAccounts
from gateway.identity.session_store import token_hash
from gateway.routes import Route
from keys.ports import Clock
from policies.model import PURPOSES, Assurance, Purpose

_MAX_COOKIE_CHARACTERS: Final = 128
_REFUSED_CHALLENGE: Final = 'Bearer realm="havengate", error="invalid_token"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Identifier:
    """Finds out who sends a request. `purposes` are the configured ones by role.

    Raises `DirectoryError` or `UnavailableError` when it cannot be told, and `BadRequestError` for
    a purpose in no vocabulary, or beside those that a token states. In the usual case it answers
    from memory.
    """

    directory: Directory
    tokens: BearerTokens
    services: ServiceAccounts
    clock: Clock
    purposes: Mapping[str, Purpose]

    async def identify(self, head: RequestHead, route: Route) -> Identified | NotIdentified:
        """Who asks for something of `route`. The same person is the same on every route."""
        del route
        shown = head.headers.all("authorization")
        tokens = cookies(head.headers, SESSION_COOKIE)
        if len(shown) + len(tokens) > 1:
            return NotIdentified(reason="ambiguous", credentials_given=True)
        if shown:
            found = await self._by_authorization(shown[0])
        elif tokens:
            found = await self._by_cookie(head)
        else:
            found = NotIdentified(reason="no_credentials")
        if isinstance(found, NotIdentified):
            return found
        return replace(found, purpose=self._purpose(head, found))

    async def session(self, head: RequestHead) -> SessionView | NotIdentified:
        """The session whose cookie a request carries, whatever its method."""
        tokens = cookies(head.headers, SESSION_COOKIE)
        if len(tokens) != 1:
            return NotIdentified(
                reason="ambiguous" if tokens else "no_credentials", credentials_given=bool(tokens)
            )
        if len(tokens[0]) > _MAX_COOKIE_CHARACTERS:
            return NotIdentified(reason="bad_token", credentials_given=True)
        return await self._view(tokens[0])

    async def _by_authorization(self, header: str) -> Identified | NotIdentified:
        token = bearer_token(header)
        if token is None:
            return _refused("bad_token")
        if token.startswith(PREFIX):
            return self.services.identify(token) or _refused("bad_token")
        found = await self.tokens.identify(token)
        return _refused(found) if isinstance(found, str) else found

    async def _by_cookie(self, head: RequestHead) -> Identified | NotIdentified:
        if head.method not in SAFE_METHODS and not is_same_origin(head):
            return NotIdentified(reason="cross_site", credentials_given=True)
        view = await self.session(head)
        if isinstance(view, NotIdentified):
            return view
        return self._identified(view)

    async def _view(self, token: str) -> SessionView | NotIdentified:
        sessions, hashed = self.directory.sessions, token_hash(token)
        view = sessions.kept(hashed)
        if view is None:
            view = await asyncio.to_thread(sessions.load, hashed)
        if view is None:
            return NotIdentified(reason="bad_token", credentials_given=True)
        state = sessions.state(view)
        if state != "valid":
            return NotIdentified(
                reason="expired_token" if state == "expired" else "revoked", credentials_given=True
            )
        if sessions.due(view):
            await asyncio.to_thread(sessions.note_use, view.session)
        return view

    def _identified(self, view: SessionView) -> Identified:
        account, session = view.account, view.session
        assurance = Assurance(
            second_factor=session.second_factor, second_factor_at=session.second_factor_at
        )
        principal = account.principal(assurance)
        return Identified(
            principal=principal,
            means="session",
            person=account.person,
            purpose=default_purpose(principal, self.purposes),
            role=account.role,
            client="browser",
            session=session.id,
            break_glass=open_break_glass(view.grants, self.clock()),
            claims={"auth_time": str(int(session.began_at))},
        )

    def _purpose(self, head: RequestHead, found: Identified) -> Purpose:
        stated = head.headers.all(PURPOSE_HEADER)
        if stated:
            purpose = next((one for one in PURPOSES if stated == [one]), None)
            if purpose is None:
                raise BadRequestError(
                    f"expected one {PURPOSE_HEADER} with a code of HL7 PurposeOfUse such as TREAT, "
                    "got something else; correct it, or leave it out"
                )
            if found.principal.purposes and purpose not in found.principal.purposes:
                raise BadRequestError(
                    f"expected a {PURPOSE_HEADER} that the token or the registration states, got "
                    "another purpose; leave it out, or have it added where the token is issued"
                )
            return purpose
        if found.principal.purposes:
            return found.purpose
        configured = next(
            (
                self.purposes[role]
                for role in sorted(found.principal.roles)
                if role in self.purposes
            ),
            None,
        )
        return (
            found.purpose if configured is None or found.principal.kind == "service" else configured
        )


def _refused(reason: Refusal) -> NotIdentified:
    return NotIdentified(reason=reason, challenge=_REFUSED_CHALLENGE, credentials_given=True)
