"""`havengate device` receipts, budget, cap, check: what was asked, and what it cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from federated.node.cli_shared import (
    JSONOption,
    PersonOption,
    YesOption,
    opened_store,
    person_of,
    print_json,
    say,
)

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from federated.node.budget import Budget
    from federated.node.store import Store


def receipts(
    context: typer.Context,
    *,
    person: PersonOption = None,
    last: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    as_json: JSONOption = False,
) -> None:
    """Show who asked what of you, what it cost, what is left, and what was refused and why."""
    from federated.node.receipts import Receipts

    with opened_store(context, older="say") as store:
        found = Receipts(store).of(person_of(store, person))[::-1][:last]
    if as_json:
        print_json({"receipts": [one.plain() for one in found]})
        return
    if not found:
        say("Nobody has asked anything yet.")
    for one in found:
        say(f"{one.words()}\n")


def _budget(store: Store) -> Budget:
    from federated.accounting import Accountant
    from federated.node.budget import Budget

    return Budget(store, lambda delta, adaptive: Accountant(delta=delta, adaptive=adaptive))


def budget(
    context: typer.Context, *, person: PersonOption = None, as_json: JSONOption = False
) -> None:
    """Show what was spent on you, by study, and what is left."""
    with opened_store(context) as store:
        whose, ledger = person_of(store, person), _budget(store)
        ledger.ready()
        most = ledger.cap()
        names = dict.fromkeys(one.study for one in ledger.spends(whose))
        studies = {name: ledger.spent(whose, name) for name in names}
        spent = ledger.spent(whose)
    left = max(0.0, most.epsilon - spent)
    if as_json:
        print_json(
            {
                "epsilon": most.epsilon, "delta": most.delta, "spent": _finite(spent), "left": left,
                "studies": {name: _finite(epsilon) for name, epsilon in studies.items()},
            }
        )  # fmt: skip
        return
    for name, epsilon in studies.items():
        say(f"{name:<40} ε = {epsilon:.3g}")
    say(f"Spent        ε = {spent:.3g} of {most.epsilon:g} (δ = {most.delta:g})")
    say(f"Left         ε = {left:.3g}. What is spent is never given back.")


def _finite(epsilon: float) -> float | None:
    """JSON knows no infinity."""
    return epsilon if math.isfinite(epsilon) else None


def cap(
    context: typer.Context,
    *,
    epsilon: Annotated[float, typer.Option(help="What may ever be spent on a person: ε.")],
    delta: Annotated[float, typer.Option(help="… at this δ.")] = 1e-4,
    yes: YesOption = False,
    as_json: JSONOption = False,
) -> None:
    """Set how much may ever be spent on a person here. Less counts at once; more asks first."""
    from federated.node.budget import Cap

    with opened_store(context) as store:
        ledger = _budget(store)
        old = ledger.cap()
        if (epsilon > old.epsilon or delta > old.delta) and not yes:
            typer.confirm(
                f"More than ε = {old.epsilon:g} (δ = {old.delta:g}) could then be learnt about "
                "each person. Go on?",
                abort=True,
                err=True,
            )
        ledger.set_cap(Cap(epsilon=epsilon, delta=delta))
    if as_json:
        print_json({"epsilon": epsilon, "delta": delta})
        return
    say(f"Cap          ε = {epsilon:g}, δ = {delta:g}")


def check(context: typer.Context, *, as_json: JSONOption = False) -> None:
    """Check that the ledger is whole, and that this is not an older copy of the store."""
    with opened_store(context) as store:
        _budget(store).verify()
    if as_json:
        print_json({"sound": True})
        return
    say("Sound        the ledger is whole and the newest that there is")
