"""The gateway's own pages under `/.havengate/`: which page answers which request.

Every page that changes something takes a form that we made, sent from our own host, and pages
answer only a browser that goes there: scripts and frames of an app on the same host can neither
read nor send forms. An app can still draw a page that looks like ours. What the pages do stands in
`sign_in`, `own_account`, `directory` and `totp`; how they look in `pages/` and `texts`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from audit.errors import AuditError
from gateway.core.commands import Fetched
from gateway.core.messages import RequestHead
from gateway.errors import AccountError, BadRequestError, DirectoryError, UnavailableError
from gateway.identity.assertion import Assertions
from gateway.identity.credentials import SESSION_COOKIE, cookies, is_navigation, is_same_origin
from gateway.identity.devices import DEVICE_COOKIE, KEPT_S
from gateway.identity.forms import VISIT_COOKIE, Forms, parse_form, parse_query, safe_next
from gateway.identity.identify import Identifier
from gateway.identity.own_account import OwnAccount, may_break_glass
from gateway.identity.records import Account, SessionView
from gateway.identity.rendering import Renderer, cookie, kept_cookie, key_set, no_cookie, redirect
from gateway.identity.sign_in import Refused, SignedIn, SignIn
from gateway.identity.texts import text
from gateway.routes import OWN_PREFIX
from keys.errors import KeysError

_HOME: Final = f"{OWN_PREFIX}account"
_SIGN_IN: Final = f"{OWN_PREFIX}sign-in"
_STATUS: Final[dict[Refused, int]] = {"wrong": 401, "locked": 403, "too_many": 429}
_MAX_VISIT_CHARACTERS: Final = 64
#: A code that was shown so recently opens a record in an emergency, too.
_JUST_NOW_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """A request to one of the pages, as far as it was understood."""

    head: RequestHead
    fields: dict[str, str] = field(repr=False)
    visit: str = field(repr=False)
    device: str = field(repr=False)
    view: SessionView | None = field(repr=False)

    @property
    def next(self) -> str:
        return safe_next(self.fields.get("next", ""), _HOME)

    @property
    def bound_to(self) -> str:
        """What the forms of this person are bound to."""
        return f"session {self.view.session.id}" if self.view else ""


type _Page = Callable[[_Visit], Awaitable[Fetched]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPages:
    """Answers every request below `OWN_PREFIX`. Never raises but for mistakes in the program."""

    identifier: Identifier
    assertions: Assertions
    sign_in: SignIn
    own_account: OwnAccount
    forms: Forms
    renderer: Renderer

    async def answer(self, head: RequestHead, body: bytes) -> Fetched:
        """The page. If log, keys or directory are down it says so, and nothing is done."""
        found = await self._answer(head, body)
        if head.method == "HEAD":
            return Fetched(head=found.head, body=b"")
        return found

    async def _answer(self, head: RequestHead, body: bytes) -> Fetched:
        name = head.path.removeprefix(OWN_PREFIX)
        method = "GET" if head.method == "HEAD" else head.method
        if method == "GET" and name == "jwks.json":
            return await self._guarded(self._jwks)
        if method == "GET" and name == "style.css":
            return self.renderer.style()
        pages = self._pages()
        page = pages.get((method, name))
        if page is None:
            allowed = [verb for verb, known in pages if known == name]
            if not allowed:
                return self.renderer.problem(404)
            return self.renderer.problem(405, headers=(("allow", ", ".join(allowed)),))
        if not is_navigation(head) or (method == "POST" and not is_same_origin(head)):
            return self.renderer.problem(403)

        async def run() -> Fetched:
            return await page(await self._visit(head, body))

        return await self._guarded(run)

    def _pages(self) -> dict[tuple[str, str], _Page]:
        signed_in = self._signed_in
        return {
            ("GET", ""): self._home,
            ("GET", "sign-in"): self._show_sign_in,
            ("POST", "sign-in"): self._take_password,
            ("POST", "sign-in/code"): self._take_code,
            ("POST", "sign-in/enrol"): self._take_enrolment,
            ("GET", "step-up"): signed_in(self._show_step_up),
            ("POST", "step-up"): signed_in(self._take_step_up),
            ("POST", "sign-out"): signed_in(self._sign_out),
            ("GET", "break-glass"): signed_in(self._show_break_glass),
            ("POST", "break-glass"): signed_in(self._open_break_glass),
            ("POST", "break-glass/end"): signed_in(self._end_break_glass),
            ("GET", "account"): signed_in(self._show_account),
            ("POST", "account/end-sessions"): signed_in(self._end_others),
            ("POST", "account/password"): signed_in(self._change_password),
        }

    async def _guarded(self, run: Callable[[], Awaitable[Fetched]]) -> Fetched:
        try:
            return await run()
        except BadRequestError as error:
            return self.renderer.problem(error.status)
        except (AuditError, KeysError, DirectoryError, UnavailableError):
            return self.renderer.problem(503)

    async def _visit(self, head: RequestHead, body: bytes) -> _Visit:
        fields = parse_form(head, body) if head.method == "POST" else parse_query(head)
        found = await self.identifier.session(head)
        visits = cookies(head.headers, VISIT_COOKIE)
        devices = cookies(head.headers, DEVICE_COOKIE)
        known = len(visits) == 1 and 0 < len(visits[0]) <= _MAX_VISIT_CHARACTERS
        return _Visit(
            head=head,
            fields=fields,
            visit=visits[0] if known else "",
            device=devices[0] if len(devices) == 1 else "",
            view=found if isinstance(found, SessionView) else None,
        )

    def _signed_in(self, page: Callable[[_Visit, SessionView], Awaitable[Fetched]]) -> _Page:
        """For those who are signed in, by forms that we made for this very session."""

        async def run(visit: _Visit) -> Fetched:
            if visit.view is None:
                here = visit.head.target if visit.head.method != "POST" else _HOME
                return redirect(f"{_SIGN_IN}?next={quote(here, safe='')}")
            if visit.head.method == "POST" and not self.forms.is_ours(visit.fields, visit.bound_to):
                return self.renderer.problem(403)
            return await page(visit, visit.view)

        return run

    async def _home(self, visit: _Visit) -> Fetched:
        return redirect(_HOME if visit.view else _SIGN_IN)

    async def _jwks(self) -> Fetched:
        return key_set(await self.assertions.jwks())

    # --- Sign-in ----------------------------------------------------------------------------------

    async def _show_sign_in(self, visit: _Visit) -> Fetched:
        told = text("sign_in.signed_out") if "signed-out" in visit.fields else ""
        return self._sign_in_page(visit, told=told)

    async def _take_password(self, visit: _Visit) -> Fetched:
        if not self._is_our_visit(visit):
            return self._sign_in_page(visit, error=text("sign_in.again"), status=400)
        login, password = visit.fields.get("login", ""), visit.fields.get("password", "")
        found = await self.sign_in.password(login, password, visit.head.client, visit.device)
        if isinstance(found, Account):
            return await self._second_step(visit, found)
        error = self._refusal(found, wrong="sign_in.wrong")
        return self._sign_in_page(visit, error=error, status=_STATUS[found], login=login)

    async def _second_step(self, visit: _Visit, account: Account, error: str = "") -> Fetched:
        values: dict[str, Any] = {
            "csrf": self.forms.code(f"visit {visit.visit}"),
            "next": visit.next,
            "ticket": visit.fields.get("ticket") or self.forms.ticket(account, visit.visit),
            "error": error,
        }
        status = 401 if error else 200
        if not account.must_set_second_factor:
            return self.renderer.page("code", values, status=status)
        enrolment = await self.sign_in.second_factors.enrol(account, visit=visit.visit)
        seed = enrolment.secret
        values |= {
            "login": account.login,
            "uri": enrolment.uri,
            "groups": [seed[at : at + 4] for at in range(0, len(seed), 4)],
        }
        return self.renderer.page("enrol", values, status=status)

    async def _take_code(self, visit: _Visit) -> Fetched:
        return await self._take_second_step(visit, enrol=False)

    async def _take_enrolment(self, visit: _Visit) -> Fetched:
        return await self._take_second_step(visit, enrol=True)

    async def _take_second_step(self, visit: _Visit, *, enrol: bool) -> Fetched:
        account = None
        if self._is_our_visit(visit):
            account = await asyncio.to_thread(
                self.forms.account_of,
                visit.fields.get("ticket", ""),
                visit.visit,
                self.sign_in.directory.accounts,
            )
        if account is None or account.must_set_second_factor is not enrol:
            return self._sign_in_page(visit, error=text("sign_in.again"), status=400)
        shown = (account, visit.fields.get("code", ""), visit.head.client, visit.device)
        try:
            if enrol:
                found = await self.sign_in.enrol(*shown, visit=visit.visit)
            else:
                found = await self.sign_in.code(*shown)
        except AccountError:
            # Locked, reset or set up in another window since the password was shown.
            return self._sign_in_page(visit, error=text("sign_in.again"), status=400)
        if not isinstance(found, SignedIn):
            return await self._second_step(visit, account, self._refusal(found, wrong="code.wrong"))
        if visit.view is not None:
            # Whoever was signed in here before is not any more.
            await asyncio.to_thread(self.sign_in.directory.sessions.end, visit.view.session.id)
        return await self._welcome(visit, found)

    async def _welcome(self, visit: _Visit, found: SignedIn) -> Fetched:
        device = await asyncio.to_thread(
            self.sign_in.directory.devices.remember, found.session.account, visit.device
        )
        lines = (
            cookie(SESSION_COOKIE, found.token),
            no_cookie(VISIT_COOKIE),
            kept_cookie(DEVICE_COOKIE, device, KEPT_S),
        )
        return redirect(visit.next, cookies=lines)

    def _is_our_visit(self, visit: _Visit) -> bool:
        return bool(visit.visit) and self.forms.is_ours(visit.fields, f"visit {visit.visit}")

    def _sign_in_page(
        self, visit: _Visit, *, error: str = "", told: str = "", status: int = 200, login: str = ""
    ) -> Fetched:
        name = visit.visit or secrets.token_urlsafe(16)
        values = {
            "csrf": self.forms.code(f"visit {name}"),
            "next": visit.next,
            "error": error,
            "told": told,
            "login": login,
        }
        return self.renderer.page(
            "sign_in", values, status=status, cookies=(cookie(VISIT_COOKIE, name),)
        )

    def _refusal(self, refused: Refused, *, wrong: str) -> str:
        minutes = -int(-self.sign_in.directory.attempts.window_s // 60)
        return {
            "wrong": text(wrong),
            "locked": text("sign_in.locked"),
            "too_many": text("sign_in.too_many", minutes=minutes),
        }[refused]

    # --- Step-up and sign-out ---------------------------------------------------------------------

    async def _show_step_up(self, visit: _Visit, view: SessionView) -> Fetched:
        del view
        return self._step_up_page(visit)

    async def _take_step_up(self, visit: _Visit, view: SessionView) -> Fetched:
        try:
            found = await self.sign_in.step_up(
                view.account,
                view.session,
                visit.fields.get("code", ""),
                visit.head.client,
                visit.device,
            )
        except AccountError:
            return redirect(f"{_SIGN_IN}?next={quote(visit.next, safe='')}")
        if isinstance(found, SignedIn):
            return redirect(visit.next, cookies=(cookie(SESSION_COOKIE, found.token),))
        return self._step_up_page(
            visit, self._refusal(found, wrong="code.wrong"), status=_STATUS[found]
        )

    def _step_up_page(self, visit: _Visit, error: str = "", status: int = 200) -> Fetched:
        values = {"csrf": self.forms.code(visit.bound_to), "next": visit.next, "error": error}
        return self.renderer.page("step_up", values, status=status)

    async def _sign_out(self, visit: _Visit, view: SessionView) -> Fetched:
        await self.own_account.sign_out(view, visit.head.client)
        return redirect(f"{_SIGN_IN}?signed-out=1", cookies=(no_cookie(SESSION_COOKIE),))

    # --- Break-glass ------------------------------------------------------------------------------

    async def _show_break_glass(self, visit: _Visit, view: SessionView) -> Fetched:
        return await self._break_glass_page(visit, view, {})

    async def _open_break_glass(self, visit: _Visit, view: SessionView) -> Fetched:
        shown: list[SignedIn] = []

        async def prove() -> str | None:
            if self._factor_is_fresh(view):
                return None
            found = await self.sign_in.step_up(
                view.account,
                view.session,
                visit.fields.get("code", ""),
                visit.head.client,
                visit.device,
            )
            if not isinstance(found, SignedIn):
                return self._refusal(found, wrong="code.wrong")
            shown.append(found)
            return None

        try:
            errors = await self.own_account.open_break_glass(
                view, visit.fields, visit.head.client, prove=prove
            )
        except AccountError:
            # Others were opened at the same moment, or the session was ended.
            errors = {"patient": text("glass.too_many")}
        if errors and not shown:
            return await self._break_glass_page(visit, view, errors)
        cookies = tuple(cookie(SESSION_COOKIE, one.token) for one in shown)
        page = f"{OWN_PREFIX}break-glass"
        # The form on the page belongs to the session that has another token now.
        target = page if errors else safe_next(visit.fields.get("next", ""), page)
        return redirect(target, cookies=cookies)

    def _factor_is_fresh(self, view: SessionView) -> bool:
        """Whether the code was shown just now: the next one may be half a minute away."""
        age_s = self.own_account.log.clock() - view.session.second_factor_at
        return view.session.second_factor != "none" and 0 <= age_s < _JUST_NOW_S

    async def _end_break_glass(self, visit: _Visit, view: SessionView) -> Fetched:
        grant = visit.fields.get("grant", "")
        await self.own_account.end_break_glass(view, grant, visit.head.client)
        return redirect(f"{OWN_PREFIX}break-glass")

    async def _break_glass_page(
        self, visit: _Visit, view: SessionView, errors: dict[str, str]
    ) -> Fetched:
        grants = await asyncio.to_thread(self.own_account.directory.grants.of, view.account.id)
        values = {
            "csrf": self.forms.code(visit.bound_to),
            "next": safe_next(visit.fields.get("next", ""), ""),
            "errors": {"patient": "", "reason": "", "minutes": "", "code": ""} | errors,
            "asks_code": not self._factor_is_fresh(view),
            "fields": {"patient": "", "reason": "", "minutes": "60"} | visit.fields,
            "grants": grants,
            "may": may_break_glass(view.account),
        }
        return self.renderer.page("break_glass", values, status=400 if errors else 200)

    # --- The account ------------------------------------------------------------------------------

    async def _show_account(self, visit: _Visit, view: SessionView) -> Fetched:
        told = {"changed": "account.changed", "ended": "account.ended_others"}
        name = told.get(visit.fields.get("told", ""))
        return await self._account_page(visit, view, told=text(name) if name else "")

    async def _end_others(self, visit: _Visit, view: SessionView) -> Fetched:
        await self.own_account.end_others(view, visit.head.client)
        return redirect(f"{_HOME}?told=ended")

    async def _change_password(self, visit: _Visit, view: SessionView) -> Fetched:
        try:
            found = await self.own_account.change_password(
                view,
                current=visit.fields.get("current", ""),
                new=visit.fields.get("new", ""),
                address=visit.head.client,
                device=visit.device,
            )
        except AccountError:
            # The session was ended, or the password changed, in another window.
            return redirect(_SIGN_IN)
        if isinstance(found, SignedIn):
            return redirect(f"{_HOME}?told=changed", cookies=(cookie(SESSION_COOKIE, found.token),))
        if found == "not_acceptable":
            return await self._account_page(visit, view, errors={"new": text("account.new_wrong")})
        error = self._refusal(found, wrong="account.current_wrong")
        return await self._account_page(visit, view, errors={"current": error})

    async def _account_page(
        self,
        visit: _Visit,
        view: SessionView,
        *,
        told: str = "",
        errors: dict[str, str] | None = None,
    ) -> Fetched:
        sessions = await asyncio.to_thread(self.own_account.directory.sessions.of, view.account.id)
        values = {
            "csrf": self.forms.code(visit.bound_to),
            "account": view.account,
            "may_break_glass": may_break_glass(view.account),
            "this": view.session.id,
            "sessions": sessions,
            "told": told,
            "errors": {"current": "", "new": ""} | (errors or {}),
        }
        return self.renderer.page("account", values, status=400 if errors else 200)
