"""`havengate device consent`: list, give, study, revoke."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federated.errors import ManifestError, StoreError
from federated.node.cli_shared import (
    JSONOption,
    PersonOption,
    YesOption,
    now,
    opened_store,
    person_of,
    print_json,
    say,
    time_text,
)

if TYPE_CHECKING:
    from federated.node.consent import Consent, Scope

consent_app = typer.Typer(no_args_is_help=True, help="What you agree to. By default: nothing.")


def _consent_object(one: Consent) -> dict[str, Any]:
    return {
        "number": one.number,
        "study": one.scope.study or None,
        "kinds": sorted(one.scope.kinds),
        "columns": sorted(one.scope.columns),
        "purposes": sorted(one.scope.purposes),
        "given": time_text(one.given_at),
        "revoked": time_text(one.revoked_at),
    }


@consent_app.command("list")
def consent_list(
    context: typer.Context, *, person: PersonOption = None, as_json: JSONOption = False
) -> None:
    """Show what you agreed to, and what you took back."""
    from federated.node.consent import Consents

    with opened_store(context) as store:
        found = [_consent_object(one) for one in Consents(store).of(person_of(store, person))]
    if as_json:
        print_json({"consents": found})
        return
    if not found:
        say("You agreed to nothing, so no study gets an answer from you.")
    for one in found:
        what = f"study {one['study'][:16]}…" if one["study"] else ", ".join(one["kinds"])
        state = f"taken back {one['revoked']}" if one["revoked"] else f"since {one['given']}"
        say(f"{one['number']:>4}  {what}: {', '.join(one['columns'])}")
        say(f"      for {', '.join(one['purposes'])}; {state}")


@consent_app.command("give")
def consent_give(
    context: typer.Context,
    *,
    kind: Annotated[list[str], typer.Option(help="A kind of question, as mean or histogram.")],
    column: Annotated[list[str], typer.Option(help="A column that may be used.")],
    purpose: Annotated[list[str], typer.Option(help="A purpose of use, as HRESCH for research.")],
    person: PersonOption = None,
    everybody: Annotated[
        bool, typer.Option("--everybody", help="At a site: record the same consent of everybody.")
    ] = False,
    as_json: JSONOption = False,
) -> None:
    """Agree to kinds of questions over columns for purposes, in whatever study asks them."""
    from federated.node.consent import Scope

    scope = Scope(kinds=frozenset(kind), columns=frozenset(column), purposes=frozenset(purpose))
    _give(context, scope, person=person, everybody=everybody, as_json=as_json)


@consent_app.command("study")
def consent_study(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The signed study.")],
    *,
    person: PersonOption = None,
    everybody: Annotated[
        bool, typer.Option("--everybody", help="At a site: record the same consent of everybody.")
    ] = False,
    yes: YesOption = False,
    as_json: JSONOption = False,
) -> None:
    """Read what one study asks, and agree to it as it is: if a word of it changes, not to that."""
    from federated.node.consent import Scope
    from federated.node.enrolment import enrolled
    from federated.signed_study import MAX_SIGNED_BYTES, parse_signed_study, verify_study

    try:
        with file.open("rb") as opened:
            signed = parse_signed_study(opened.read(MAX_SIGNED_BYTES + 1))
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file} is not a signed study.") from error
    with opened_store(context) as store:
        verify_study(signed, enrolled(store).trusted())
    study = signed.study
    if not as_json:
        say(f"{study.title}\n{study.question}\n")
        for query in study.queries:
            say(f"  {query.name:<20} uses {', '.join(query.columns)}; ε = {query.epsilon:g}")
        say(f"\nIn all at most ε = {study.epsilon:g}, for {study.purpose}, until")
        say(f"{time_text(study.valid_until)}, with at least {study.minimum_cohort} people.")
    if not yes:
        typer.confirm("Do you agree?", abort=True, err=True)
    scope = Scope(
        study=study.study_hash,
        columns=frozenset(study.columns),
        purposes=frozenset({study.purpose}),
    )
    _give(context, scope, person=person, everybody=everybody, as_json=as_json)


def _give(
    context: typer.Context, scope: Scope, *, person: str | None, everybody: bool, as_json: bool
) -> None:
    from federated.node.consent import Consents

    if everybody and person is not None:
        raise StoreError("Name one person with --person, or say --everybody: not both.")
    with opened_store(context) as store:
        people = store.people() if everybody else (person_of(store, person),)
        Consents(store).give(people, scope, now=now())
    if as_json:
        print_json({"people": len(people)})
        return
    say("Agreed. `havengate device consent revoke` takes it back at once.")


@consent_app.command("revoke")
def consent_revoke(
    context: typer.Context,
    number: Annotated[int | None, typer.Argument(help="Which one. Without it: all.")] = None,
    *,
    person: PersonOption = None,
    as_json: JSONOption = False,
) -> None:
    """Take consent back. It counts at once, also for a round that is under way."""
    from federated.node.consent import Consents

    with opened_store(context) as store:
        count = Consents(store).revoke(person_of(store, person), number, now=now())
    if as_json:
        print_json({"revoked": count})
        return
    say(f"{count} taken back. What was spent before stays spent.")
