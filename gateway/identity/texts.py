"""All words of the gateway's own pages, in one place. English; a template asks by name."""

from __future__ import annotations

from typing import Final

TEXTS: Final[dict[str, str]] = {
    "product": "Havengate",
    "footer": "This page belongs to the gateway that protects your records.",
    "danger": "If you or somebody else is in danger now, call your local emergency number.",
    "crisis": "Get help now, without signing in",
    "continue": "Continue",
    "cancel": "Cancel",
    "problem": "There is a problem",
    # Sign-in
    "sign_in.title": "Sign in",
    "sign_in.step": "Step 1 of 2",
    "sign_in.login": "User name",
    "sign_in.password": "Password",
    "sign_in.help": "Forgotten your password? Your administrator can give you a new one.",
    "sign_in.wrong": "User name and password do not match. Check both and try again.",
    "sign_in.locked": "This account is locked. Ask your administrator to open it again.",
    "sign_in.too_many": "Too many attempts. Wait {minutes} minutes, then try again.",
    "sign_in.again": "That took too long, or this page was opened twice. Please sign in again.",
    "sign_in.signed_out": "You are signed out.",
    # Second factor
    "code.title": "Enter your code",
    "code.step": "Step 2 of 2",
    "code.label": "Code from your authenticator app",
    "code.hint": "Six digits that change every half minute.",
    "code.wrong": "This code is not right, or was used already. Wait for the next one.",
    "code.help": "Lost your phone? Your administrator can help you set up another.",
    # Enrolment
    "enrol.title": "Set up your second step",
    "enrol.why": "Your password alone is not enough to protect what is kept here. From now on you "
    "also need a code from an authenticator app on your phone. You do this once.",
    "enrol.one": "Open an authenticator app on your phone. If you have none, install one first.",
    "enrol.two": "In the app, add an account and scan this picture:",
    "enrol.picture": "QR code that holds the key below",
    "enrol.key": "If it cannot be scanned, choose to enter a key in the app, and type this one:",
    "enrol.link": "On this phone? Open the key in your authenticator app",
    "enrol.three": "The app now shows six digits. Type them here.",
    "enrol.name": "Name of the account",
    "enrol.button": "Finish set-up",
    # Step-up
    "step_up.title": "Show your code again",
    "step_up.why": "What you want to open is specially protected. Please show that it is still "
    "you.",
    # Break-glass
    "glass.title": "Open a record in an emergency",
    "glass.why": "Use this when a patient needs you now and you have no access to the record.",
    "glass.review": "Everything you open is written down with your name, your reason is kept, and "
    "somebody will review it afterwards.",
    "glass.patient": "Number of the patient's record",
    "glass.patient_hint": "For example 3",
    "glass.patient_wrong": "Enter the number of one record, without spaces.",
    "glass.reason": "Why can it not wait?",
    "glass.reason_hint": "At least 10 characters.",
    "glass.reason_wrong": "Say in a few words why it cannot wait: 10 to 500 characters.",
    "glass.duration": "For how long?",
    "glass.duration_wrong": "Choose one of the times.",
    "glass.too_many": "You have as many records open as one person may. End one first.",
    "glass.button": "Open the record",
    "glass.open": "Open now",
    "glass.patient_named": "Patient",
    "glass.until": "until",
    "glass.end": "Close this record",
    "glass.not_for_you": "Opening a record in an emergency is for people who treat patients. Ask "
    "a colleague who does.",
    "glass.minutes.30": "30 minutes",
    "glass.minutes.60": "1 hour",
    "glass.minutes.120": "2 hours",
    "glass.minutes.240": "4 hours",
    # Account
    "account.title": "Your account",
    "account.signed_in_as": "Signed in as",
    "account.role": "Role",
    "account.sessions": "Where you are signed in",
    "account.this": "This browser",
    "account.other": "Another browser",
    "account.began": "signed in",
    "account.used": "last used",
    "account.end_others": "Sign out everywhere else",
    "account.ended_others": "You are signed out everywhere else.",
    "account.sign_out": "Sign out",
    "account.password": "Change your password",
    "account.current": "Current password",
    "account.new": "New password",
    "account.new_hint": "At least 12 characters. A few words that you can remember are good.",
    "account.change": "Change password",
    "account.changed": "Your password is changed. You are signed out everywhere else.",
    "account.current_wrong": "The current password is not right.",
    "account.new_wrong": "Choose another: at least 12 characters, not one that many people use, "
    "not your name, no simple pattern.",
    "account.glass": "Open a record in an emergency",
    # Everything that goes wrong
    "error.400.title": "This could not be understood",
    "error.400": "Go back, reload the page and try again.",
    "error.403.title": "This was not sent from our page",
    "error.403": "To protect you, nothing was done. Go back, reload the page and try again.",
    "error.404.title": "There is no such page",
    "error.404": "Check the address.",
    "error.405.title": "This cannot be done here",
    "error.405": "Go back and use the buttons on the page.",
    "error.503.title": "This does not work right now",
    "error.503": "Nothing was changed. Try again in a minute; if it still does not work, tell your "
    "administrator.",
    "error.home": "Go to your account",
}


def text(name: str, **values: object) -> str:
    """The words of that name. Raises `KeyError` if there are none: a mistake in a template."""
    return TEXTS[name].format(**values) if values else TEXTS[name]
