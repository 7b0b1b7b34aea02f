"""A training or an evaluation in plain words, all of it: for who approves, and for who reads.

Lives here: words alone, for a terminal and for a page. Every value that was declared, and every
default that was not, is said. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from federated.learning.at_site import AtSite
from federated.learning.clipping import AdaptiveClip
from federated.learning.evaluate import EvaluateQuery
from federated.learning.models import parameters
from federated.learning.norms import UpdateNorms
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Feature, Label, TrainSpec
from federated.learning.strategies import FedAvg, FedAvgM
from federated.learning.turns import Turns
from federated.node.columns import COLUMNS

_KINDS: Final = {
    "logistic": "logistic regression",
    "linear": "linear regression",
    "mlp": "neural network (MLP, tanh)",
    "gru": "recurrent neural network (GRU)",
}


def learning_pairs(query: object) -> Iterator[tuple[str, str]]:
    """All that a training or an evaluation declares, as pairs; nothing for another question."""
    if isinstance(query, TrainQuery):
        yield from training_lines(query)
    elif isinstance(query, EvaluateQuery):
        yield from evaluation_lines(query)
    elif isinstance(query, UpdateNorms):
        yield from norms_lines(query)


def training_lines(query: TrainQuery) -> Iterator[tuple[str, str]]:
    """What a training is, as pairs of a word and what there is to say."""
    spec = query.spec
    yield from _example_lines(spec)
    yield "rounds", f"{spec.rounds} at most; a person pays once for all of them"
    work = spec.work
    if query.at_site is None:
        yield (
            "on device",
            (
                f"{work.epochs} steps of gradient descent a round, rate {exact(work.rate)}, "
                f"weight decay {exact(work.l2)}, over the newest {spec.most} examples of a person"
            ),
        )
    else:
        yield "at sites", site_words(spec, query.at_site)
    yield "clip", clip_words(query)
    if query.turns is not None:
        yield "turns", turns_words(query.turns)
    yield "strategy", strategy_words(query.strategy)
    yield "stop", stop_words(query)
    yield "held out", held_out_words(spec)
    yield "audit", canary_words(query)


def evaluation_lines(query: EvaluateQuery) -> Iterator[tuple[str, str]]:
    """What an evaluation is, in the same form."""
    spec = query.spec
    yield "judges", f"the model that the training {spec.name} of this study gives"
    yield from _example_lines(spec)
    yield "asks", f"only people who were never trained on: {held_out_words(spec)}"
    counts = "each person counts the same" if query.examples == 1 else (
        f"a person counts fully from {query.examples} examples on, with fewer in proportion"
    )  # fmt: skip
    yield "counts", f"{counts}; the newest {spec.most} examples of a person"
    if spec.label.is_class:
        yield "scores", f"told apart at {query.bins} steps"
    else:
        largest = query.largest_error or spec.label.high - spec.label.low
        yield "errors", f"above {exact(largest)} count as {exact(largest)}"
    for one in query.subgroups:
        edges = ", ".join(map(exact, one.edges))
        yield "by group", f"of {one.column} ({meaning_of(one.column)}), edges {edges}"


def norms_lines(query: UpdateNorms) -> Iterator[tuple[str, str]]:
    """What a question about the length of updates is, in the same form."""
    spec, work = query.spec, query.spec.work
    yield "measures", "how long people's first updates of such a model are, to fix a clip by"
    yield from _example_lines(spec)
    yield (
        "on device",
        (
            f"{work.epochs} steps of gradient descent, rate {exact(work.rate)}, weight decay "
            f"{exact(work.l2)}, over the newest {spec.most} examples of a person"
        ),
    )
    shares = ", ".join(exact(100 * share) for share in query.at)
    yield (
        "counts",
        (
            f"people in {query.bins} steps of length from {exact(query.low)} to "
            f"{exact(query.high)}; told at {shares} %"
        ),
    )


def label_words(label: Label) -> str:
    """What is predicted."""
    if label.at_least is not None:
        what = f"whether {label.column} is {exact(label.at_least)} or more"
    elif label.below is not None:
        what = f"whether {label.column} is below {exact(label.below)}"
    else:
        what = f"the number {label.column}"
    when = _days(label.ahead, "later")
    bounds = f"{exact(label.low)} to {exact(label.high)}"
    return f"{what}{when} ({meaning_of(label.column)}; bounds {bounds})"


def feature_words(one: Feature) -> str:
    """What one feature is, with its bounds."""
    within = ", less the person's own mean of earlier days" if one.within else ""
    known = ", and whether it is known" if one.indicator else ""
    bounds = f"bounds {exact(one.low)} to {exact(one.high)}"
    when = _days(one.lag, "before")
    return f"{one.column}{when}{within} ({meaning_of(one.column)}; {bounds}){known}"


def input_names(spec: TrainSpec) -> Sequence[str]:
    """The inputs in the order of the weights, in a few words each."""
    names = []
    columns = [one.column for one in spec.features]
    for one in spec.features:
        # Two features of a column make a bend; their bounds tell them apart.
        bend = f", {one.low:g} to {one.high:g}" if columns.count(one.column) > 1 else ""
        within = ", against the own mean" if one.within else ""
        names.append(f"{one.column}{_days(one.lag, 'before')}{within}{bend}")
        if one.indicator:
            names.append(f"{one.column}{_days(one.lag, 'before')} is known")
    return names


def model_words(spec: TrainSpec) -> str:
    """Which model it is."""
    shape = ""
    if spec.hidden:
        shape = f" of {', '.join(map(str, spec.hidden))} units"
    if spec.kind == "gru":
        shape += f" over {spec.steps} days"
    words = f"{_KINDS[spec.kind]}{shape}, {parameters(spec):,} numbers"
    if spec.personal is None:
        return words
    own = spec.personal
    return (
        f"{words}; the last layer is personal: made on the device in each round, of the older "
        f"{exact(100 * own.older)} % of a person's examples in {own.steps} steps of rate "
        f"{exact(own.rate)}, and never sent"
    )


def clip_words(query: TrainQuery) -> str:
    """How far one person can move a round's sum."""
    spec, adaptive = query.spec, query.adaptive
    whole = f"integers {exact(spec.scale)} times as large are summed"
    if query.at_site is not None:
        return f"one person's gradient counts with a length of {exact(spec.clip)} at most in a step"
    if adaptive is None:
        return f"one person's change counts with a length of {exact(spec.clip)} at most; {whole}"
    return (
        f"one person's change counts with a length of {exact(spec.clip)} at most in the first "
        f"round; {_adaptive_words(adaptive)}; {whole}"
    )


def _adaptive_words(rule: AdaptiveClip) -> str:
    return (
        f"then the bound follows what {exact(100 * rule.quantile)} % of people stay within, from a "
        f"noisy count, at rate {exact(rule.rate)}, from {exact(rule.low)} to {exact(rule.high)}"
    )


def strategy_words(strategy: FedAvg | FedAvgM) -> str:
    """How weights follow from sums."""
    text = f"weights move by {exact(strategy.rate)} times people's mean change"
    if isinstance(strategy, FedAvgM):
        nesterov = " (Nesterov)" if strategy.nesterov else ""
        text += f", with momentum {exact(strategy.momentum)}{nesterov}"
    if strategy.average_from:
        return f"{text}; given out is the mean of the weights from round {strategy.average_from} on"
    return f"{text}; given out are the last weights"


def site_words(spec: TrainSpec, at_site: AtSite) -> str:
    """What each site does in a round, and who has to be trusted with what."""
    return (
        f"each site trains on its own people: {at_site.steps} steps of DP-SGD a round, each person "
        f"in a step by chance ({exact(at_site.rate)}), steps of {exact(spec.work.rate)}, weight "
        f"decay {exact(spec.work.l2)}, over the newest {spec.most} examples of a person. The site "
        "sees its people's rows, as it does anyway, and adds the noise itself; the changes of the "
        f"weights are averaged over people and summed in integers {exact(spec.scale)} times as "
        f"large. Nodes that speak for fewer than {at_site.least} people take no part"
    )


def turns_words(turns: Turns) -> str:
    """Who brings something new in a round, and what becomes of it in later ones."""
    factors = ", ".join(map(exact, turns.factors))
    return (
        f"each person newly brings something once in {turns.gap} rounds, so on average one in "
        f"{turns.gap} does in a round; it counts in "
        f"{len(turns.factors)} rounds, its own the first, times {factors}. A device or site keeps "
        "it so long, encrypted, and whoever is away on their turn waits for the next"
    )


def stop_words(query: TrainQuery) -> str:
    """What ends a training before its last round."""
    if query.stop is None:
        return "after the last round only"
    return (
        f"earlier, if {query.stop.patience} sums one after the other cannot be told from noise "
        f"(level {exact(query.stop.level)})"
    )


def held_out_words(spec: TrainSpec) -> str:
    """Who is never trained on."""
    if not spec.held_out:
        return "nobody"
    return (
        f"{exact(100 * spec.held_out)} % of people, drawn by their own node with a secret that "
        "nobody else has"
    )


def canary_words(query: TrainQuery) -> str:
    """How the run itself is audited."""
    if not query.canaries:
        return "none"
    return f"{query.canaries} canaries: made-up people, whom nobody's data are in"


def meaning_of(column: str) -> str:
    """What a column of the daily table means, with its unit."""
    known = COLUMNS.get(column)
    if known is None:
        return column
    return known.meaning if known.unit.startswith("{") else f"{known.meaning}, in {known.unit}"


def exact(value: float) -> str:
    """A number as it is signed, without a needless point."""
    return repr(float(value)).removesuffix(".0")


def _example_lines(spec: TrainSpec) -> Iterator[tuple[str, str]]:
    yield "predicts", label_words(spec.label)
    for one in spec.features:
        yield "from", feature_words(one)
    yield "examples", "one for each day" if spec.per == "day" else "one for each person"
    yield "model", model_words(spec)


def _days(count: int, where: str) -> str:
    return f" {count} day{'' if count == 1 else 's'} {where}" if count else ""
