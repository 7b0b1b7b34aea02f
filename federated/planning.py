"""Before a study is proposed: what it costs and how sure its answers will be, and if that is true.

Lives here: the plan of a whole study from its draft. One query's plan stands in
`federated.analytics.plan`, adding costs up in `federated.accounting`. Reads nobody's data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from federated.accounting import Accountant, compose
from federated.analytics.base import BaseQuery
from federated.analytics.plan import QueryPlan, plan_query
from federated.draft import Draft, Planned, QuerySection
from federated.errors import AccountingError, BudgetExhaustedError, ManifestError
from federated.learning.declare import complete
from federated.learning.evaluate import EvaluateQuery
from federated.learning.plan import plan_training
from federated.learning.round_query import TrainQuery
from federated.manifest import DeclaredQuery, Study
from federated.model import PrivacyCost
from federated.questions import declared_question, question_from, verify_together
from federated.rounds import CLOSENESS, answer_price

#: What rounding may take a computed figure above the one that it was computed for.
_SLACK: Final = 1 + 1e-6
#: Stands for the nodes of a study that is only looked at.
NO_ROSTER: Final = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A whole study, and what to expect of it. `epsilon` at `delta`: all answers together."""

    study: Study
    queries: tuple[QueryPlan, ...]
    epsilon: float
    delta: float


def plan_study(
    draft: Draft,
    *,
    people: int,
    level: float,
    roster: str | None,
    code_hash: str,
    nodes: int | None = None,
) -> StudyPlan:
    """Choose each query's noise, fill the draft's gaps, and foresee the errors at `people`.

    Errors are those with all of `nodes` alive; of the fewest that the study allows, which make them
    largest, if that is not known. Raises `ManifestError` or `AccountingError`.
    """
    plans: list[QueryPlan] = []
    planned: dict[str, Planned] = {}
    draft = draft.asking(complete([section.ask for section in draft.file.queries]))
    for section in draft.file.queries:
        query = question_from(section.ask)
        plan = _plan(query, section, people=people, level=level, weight=_noise_weight(draft, nodes))
        plans.append(plan)
        planned[query.name] = Planned(columns=query.columns, noise=plan.noise)
    study = draft.complete(planned=planned, roster=roster, code_hash=code_hash)
    costs = study_costs(study)
    # What the file says of its noise counts, not what would have been chosen.
    plans = [replace(plan, cost=costs[plan.query]) for plan in plans]
    return StudyPlan(
        study=study,
        queries=tuple(plans),
        epsilon=compose(list(costs.values()), delta=study.delta),
        delta=study.delta,
    )


def _plan(
    query: BaseQuery | TrainQuery | EvaluateQuery,
    section: QuerySection,
    *,
    people: int,
    level: float,
    weight: float,
) -> QueryPlan:
    # Without δ there is only the noise that is exact.
    closeness = CLOSENESS * query.dimension * query.rounds if section.delta > 0 else 0.0
    epsilon, delta = section.epsilon, section.delta
    if isinstance(query, TrainQuery):
        return plan_training(
            query, epsilon=epsilon, delta=delta, people=people, level=level, closeness=closeness,
            weight=weight,
        )  # fmt: skip
    asked = query.unweighted if isinstance(query, EvaluateQuery) else query
    return plan_query(
        asked, epsilon=epsilon, delta=delta, people=people, level=level, closeness=closeness,
        weight=weight,
    )  # fmt: skip


def _noise_weight(draft: Draft, nodes: int | None) -> float:
    """How many times the planned variance a sum carries: colluding nodes' own comes on top."""
    rules = draft.file.aggregation
    if draft.file.trust_model == "trusted_server":
        return 1.0
    fewest = rules.threshold if rules.minimum_survivors is None else rules.minimum_survivors
    alive = max(fewest, nodes or 0)
    # A plan in which nobody is honest is refused when the study is made.
    return alive / max(alive - rules.colluding, 1)


def study_costs(study: Study) -> Mapping[str, PrivacyCost]:
    """What each answer really costs each person, by the query's name."""
    return {one.name: answer_price(one, declared_question(one.ask)) for one in study.queries}


def composed_epsilon(study: Study, costs: Sequence[PrivacyCost]) -> float:
    """ε of these costs together at the study's δ. Raises `AccountingError` where there is none.

    Each question once: their costs were fixed beforehand, and compose. Any cost more often than
    there are questions of it: somebody asked again, knowing earlier answers, and they are added up,
    which holds always.
    """
    if not costs:
        return 0.0
    fixed = Counter((one.noise, declared_question(one.ask).sensitivity) for one in study.queries)
    again = bool(Counter((one.noise, one.sensitivity) for one in costs) - fixed)
    return Accountant(delta=study.delta, adaptive=again).compose(costs)


def verify_within(study: Study, costs: Sequence[PrivacyCost]) -> None:
    """Prove that a study that costs this, over all its runs, keeps to what was approved.

    Raises `BudgetExhaustedError`.
    """
    if len(costs) > study.rounds:
        raise BudgetExhaustedError(
            f"The study {study.id} was approved for {study.rounds} round(s), and this would make "
            f"{len(costs)}. What failed counts, too: propose it anew."
        )
    try:
        epsilon = composed_epsilon(study, costs)
    except AccountingError as error:
        raise BudgetExhaustedError(
            f"What the study {study.id} would cost in all cannot be bounded at its δ: {error}"
        ) from error
    if not epsilon <= study.epsilon * _SLACK:
        raise BudgetExhaustedError(
            f"The study {study.id} would cost each person ε = {epsilon:.4g} at δ = "
            f"{study.delta:.2g} over all its runs; {study.epsilon:.4g} were approved."
        )


def verify_claims(study: Study) -> None:
    """Prove that the study costs no more than its file says, and that its questions go together.

    Raises `ManifestError` for a claim that is too small, `AccountingError` where there is no bound.
    """
    verify_together([declared_question(one.ask) for one in study.queries])
    costs = study_costs(study)
    for query in study.queries:
        _verify_query(query, costs[query.name])
    epsilon = composed_epsilon(study, list(costs.values()))
    if epsilon > study.epsilon * _SLACK:
        raise ManifestError(
            f"All answers together cost ε = {epsilon:.4g} at δ = {study.delta:.2g}, the study says "
            f"{study.epsilon:.4g}: `havengate study plan` says what is true."
        )


def _verify_query(query: DeclaredQuery, cost: PrivacyCost) -> None:
    if cost.epsilon > query.epsilon * _SLACK or cost.delta > query.delta * _SLACK:
        raise ManifestError(
            f"The query {query.name} costs ε = {cost.epsilon:.4g} at δ = {cost.delta:.2g} with its "
            f"noise, the study says {query.epsilon:.4g} at {query.delta:.2g}."
        )
