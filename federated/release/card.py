"""The model card: what a released model is, whom it is of, how good, how private, and what not for.

Made from the release's document alone, as the rest of the page (`report`). How well it does comes
from the study's own evaluations of it. Everything that comes from a study is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from federated.errors import ManifestError
from federated.learning.round_query import TrainQuery
from federated.learning.words import (
    clip_words,
    feature_words,
    held_out_words,
    input_names,
    label_words,
    meaning_of,
    model_words,
    site_words,
    stop_words,
    strategy_words,
    turns_words,
)
from federated.manifest import canonical_json
from federated.questions import declared_question
from federated.release.alarms import alarm_words
from federated.release.document import model_weights
from federated.release.figures import number
from federated.release.judged import judged
from federated.release.markup import noise_words, pairs_table, small
from federated.release.model_files import ModelFile

_LINEAR: Final = frozenset({"logistic", "linear"})


def model_card(
    document: Mapping[str, Any], model: Mapping[str, Any], files: Sequence[ModelFile]
) -> str:
    """One model's section. Raises `ManifestError` for a model of no training."""
    query = declared_question(canonical_json(model["ask"]).decode())
    if not isinstance(query, TrainQuery):
        raise ManifestError(f"{query.name} is no training, so it has no model.")
    name = model["query"]
    judging = [one for one in document["answers"] if judges(one, name)]
    warnings = alarm_words({**document, "models": [model]})
    parts = [
        f'<section class="model"><h3>Model {escape(name)}</h3>',
        *(f'<p class="failed"><b>Warning.</b> {escape(text)}</p>' for text in warnings),
        pairs_table(_what(model, query)),
        "<h4>How well it does</h4>",
        *(judged(one) for one in judging),
        "" if judging else "<p>It was not judged in this study: nobody knows how well it does.</p>",
        *_weights(model, query),
        "<h4>How private it is</h4>",
        pairs_table(_privacy(document, model, query)),
        "<h4>What it is for, and what not</h4>",
        _limits(query),
        *_files(name, files),
        "</section>",
    ]
    return "".join(parts)


def judges(answer: Mapping[str, Any], name: str) -> bool:
    """Whether an answer is the evaluation of the model of that name."""
    ask = answer["ask"]
    return bool(ask.get("kind") == "evaluate" and ask.get("of") == name)


def _what(model: Mapping[str, Any], query: TrainQuery) -> Iterator[tuple[str, str]]:
    spec = query.spec
    per = "each day of a person" if spec.per == "day" else "each person"
    yield "Predicts", f"{escape(label_words(spec.label))}, for {per}"
    listed = "".join(f"<li>{escape(feature_words(one))}</li>" for one in spec.features)
    yield "From", f"<ul>{listed}</ul>"
    yield "Kind", escape(model_words(spec))
    lost = model["asked"] - model["summed"]
    rounds = f"{model['asked']} of {spec.rounds} announced rounds were asked"
    new = f", of whom one in {query.gap} newly brought something" if query.gap > 1 else ""
    yield (
        "Trained on",
        f"{model['people']:,} people or more in each round{new}, at {model['nodes']} nodes or "
        f"more; {rounds}, {model['summed']} came to a sum"
        + (f"; without a sum: {lost}" if lost else ""),
    )
    if query.turns is not None:
        yield "Turns", escape(turns_words(query.turns))
    if query.at_site is not None:
        yield "At sites", escape(site_words(spec, query.at_site))
    yield "Held out", escape(held_out_words(spec)) + (
        ": they count among the people above and brought nothing; they alone are asked how well "
        "the model does" if spec.held_out else ""
    )  # fmt: skip
    yield "Clip", escape(clip_words(query))
    yield "Strategy", escape(strategy_words(query.strategy))
    yield "Ends", escape(stop_words(query))
    follows = "; the clip then follows noisy counts, which the ε below pays for too"
    yield (
        "Chosen",
        (
            "Clip and strategy were declared, and signed, before the first round: nobody's data "
            f"were asked in this study to choose them{follows if query.adaptive else ''}."
        ),
    )


def _privacy(
    document: Mapping[str, Any], model: Mapping[str, Any], query: TrainQuery
) -> Iterator[tuple[str, str]]:
    privacy, cost, audit = document["privacy"], model["cost"], model["audit"]
    noise = model["noise"]
    yield (
        "Cost",
        (
            f"ε = {number(cost['epsilon'])} at δ = {small(cost['delta'])}, for all rounds "
            "together; paid once, with the first"
        ),
    )
    yield "Unit", f"{escape(privacy['unit'])}, {escape(privacy['adjacency'])} adjacency"
    trust = escape(document["trust"]["model"].replace("_", " "))
    if query.at_site is not None:
        yield from _at_sites(cost, trust)
        return
    yield (
        "Mechanism",
        f"{noise_words(cost)} The bounds are of all rounds together, the noise of each.",
    )
    yield "Trust", trust
    if audit is None:
        yield "Audit", "None: the study has no canaries."
        return
    yield (
        "Audit",
        (
            f"Measured lower bound {number(audit['lower_bound'])} beside the claimed "
            f"ε = {number(cost['epsilon'])} ({100 * audit['confidence']:g} % sure): "
            f"{audit['correct']} of {audit['guesses']} guesses which of {audit['canaries']} "
            "canaries were in are right. A bound above the claim refutes it; one below proves "
            "nothing: the true ε lies anywhere from the bound on."
        ),
    )
    short = ", ".join(str(one + 1) for one in noise["short"])
    yield (
        "Noise",
        f"{100 * noise['share']:.3g} % of the planned variance was measured where the canaries "
        f"are: {'as planned, or more' if noise['passed'] else 'too little'}"
        + (f" (in sum {short} by itself)" if short else ""),
    )
    yield (
        "It audits",
        (
            "the noise of this very run as all nodes drew, scaled, summed and unmasked it, for the "
            "most that one person can bring"
        ),
    )
    yield (
        "It does not",
        (
            "show that nodes clip real people's changes (their installed program does that), "
            "look at noise in other places than the canaries', or watch the coordinator, which "
            "draws the canaries and reads the sums"
        ),
    )


def _at_sites(cost: Mapping[str, Any], trust: str) -> Iterator[tuple[str, str]]:
    yield (
        "Mechanism",
        (
            f"DP-SGD at each site: {noise_words(cost)} The bounds are of all steps together, the "
            "noise of each; ε is smaller than they say, since each person is in a step by chance, "
            "which nobody but the site knows."
        ),
    )
    yield (
        "Trust",
        (
            f"{trust}; each site sees its people's rows and adds the noise itself, and its share "
            "of the sum is as private as the model without any noise of others"
        ),
    )
    yield "Audit", "None: noise is added inside each site, where no canary is."


def _weights(model: Mapping[str, Any], query: TrainQuery) -> Iterator[str]:
    spec, weights = query.spec, model_weights(model)
    if spec.kind not in _LINEAR:
        return
    moves = "the log odds" if spec.label.is_class else "predictions (scaled as inputs are)"
    # A personal head, of these models the intercept, is nowhere but on devices.
    names = [*input_names(spec), *(() if spec.personal else ("intercept",))]
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{number(float(weight))}</td></tr>'
        for name, weight in zip(names, weights, strict=True)
    )
    yield (
        "<h4>Weights</h4>"
        '<table><thead><tr><th>input</th><th class="number">weight</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        f'<p class="small">A weight says by how much {moves} rises when its input goes from the '
        "middle of its bounds to the upper one. What is not known counts as the middle. Weights "
        "carry the noise of the training, and say nothing of causes.</p>"
    )


def _limits(query: TrainQuery) -> str:
    spec = query.spec
    label = escape(meaning_of(spec.label.column))
    out = (
        f"of people who have no value of {escape(spec.label.column)}: nobody could learn from them",
        "of people unlike those who took part, of other places, or of later years",
        "if somebody changes what it is told of: it learned what goes together, not what causes it",
    )
    listed = "".join(f"<li>{one}</li>" for one in out)
    return (
        "<p>It is made to answer the question of this study: what goes together in many people. "
        f"What it was taught is what people recorded ({label}), no diagnosis.</p>"
        '<p class="caution">It is <b>not for decisions about a single person</b>: not for '
        "diagnosis, treatment, insurance or work. It is wrong for many; see how often above.</p>"
        f"<p>The data do not support that it is right</p><ul>{listed}</ul>"
        "<p>The promise of privacy is about those who took part. It does not keep a model from "
        "guessing about somebody whose inputs are known.</p>"
    )


def _files(name: str, files: Sequence[ModelFile]) -> Iterator[str]:
    own = [one for one in files if one.query == name]
    if not own:
        return
    rows = "".join(f"<tr><td>{escape(one.name)}</td><td>{_digest(one)}</td></tr>" for one in own)
    yield f"<h4>Files</h4><table><tbody>{rows}</tbody></table>"


def _digest(file: ModelFile) -> str:
    if file.missing:
        return f"was not written: {escape(file.missing)}"
    return f"SHA-256 <code>{escape(file.digest)}</code>"
