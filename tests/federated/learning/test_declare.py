"""Training and evaluation are a few plain lines, read strictly, and written back the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.errors import ManifestError
from federated.learning.clipping import AdaptiveClip
from federated.learning.declare import complete, declaration_of, learning_from, verify_pairs
from federated.learning.evaluate import EvaluateQuery, Subgroup
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Feature, Label, PersonalHead, TrainSpec, Work
from federated.learning.strategies import FedAvg, FedAvgM, LostInNoise
from federated.node.columns import COLUMNS
from federated.questions import declared_question
from tests.federated.learning.samples import SPECS

TRAIN: dict[str, Any] = {
    "kind": "train",
    "name": "low-mood",
    "features": [{"column": "sleep_quality"}],
    "label": {"column": "mood", "below": 1.5},
}
EVALUATE: dict[str, Any] = {
    "kind": "evaluate",
    "name": "how-good",
    "of": "low-mood",
    "features": TRAIN["features"],
    "label": TRAIN["label"],
}
SUBGROUP = {"column": "sex", "edges": [-0.5, 0.5, 1.5]}

names = st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True)
columns = st.sampled_from(sorted(COLUMNS))


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


bounds = st.tuples(reals(-100, 100), reals(0.5, 100)).map(lambda one: (one[0], one[0] + one[1]))


@st.composite
def specs(draw: st.DrawFn) -> TrainSpec:
    """Any specification that can be trained."""
    kind = draw(st.sampled_from(["logistic", "linear", "mlp", "gru"]))
    per = "day" if kind == "gru" else draw(st.sampled_from(["day", "person"]))
    days = st.integers(0, 64) if per == "day" else st.just(0)
    classes = {"logistic": [True], "linear": [False]}.get(kind, [True, False])
    sides = ["at_least", "below"] if draw(st.sampled_from(classes)) else []
    side = {draw(st.sampled_from(sides)): draw(reals(-50, 50))} if sides else {}
    low, high = draw(bounds)
    label = Label(column=draw(columns), low=low, high=high, ahead=draw(days), **side)
    features = []
    for low, high in draw(st.lists(bounds, min_size=1, max_size=3)):
        feature = Feature(
            column=draw(columns), low=low, high=high, lag=draw(days),
            within=draw(st.booleans()), indicator=draw(st.booleans()),
        )  # fmt: skip
        features.append(feature)
    layers = {"mlp": (1, 4), "gru": (1, 1)}.get(kind, (0, 0))
    hidden = draw(st.lists(st.integers(1, 9), min_size=layers[0], max_size=layers[1]))
    head = st.builds(
        PersonalHead, steps=st.integers(1, 100), rate=reals(0.01, 1000), older=reals(0.1, 0.9)
    )
    return TrainSpec(
        name=draw(names),
        features=tuple(features),
        label=label,
        kind=kind,  # type: ignore[arg-type]
        hidden=tuple(hidden),
        steps=draw(st.integers(2, 64)) if kind == "gru" else 1,
        per=per,  # type: ignore[arg-type]
        most=draw(st.integers(1, 4096)),
        work=Work(
            epochs=draw(st.integers(1, 100)), rate=draw(reals(0.01, 1000)), l2=draw(reals(0, 10))
        ),
        clip=draw(reals(0.01, 100)),
        scale=draw(reals(100, 1e6)),
        rounds=draw(st.integers(1, 1000)),
        held_out=draw(reals(0.01, 0.9)),
        personal=draw(st.none() | head) if per == "day" else None,
    )


@st.composite
def trainings(draw: st.DrawFn) -> TrainQuery:
    """Any training, with any part of it left out or not."""
    spec = draw(specs())
    start = st.integers(0, spec.rounds)
    momentum = st.builds(
        FedAvgM, rate=reals(0.01, 10), momentum=reals(0, 0.99), nesterov=st.booleans(),
        average_from=start,
    )  # fmt: skip
    adaptive = st.builds(
        AdaptiveClip, quantile=reals(0.01, 0.99), rate=reals(0.01, 1), low=reals(1e-6, 1),
        high=reals(2, 1e6),
    )  # fmt: skip
    stop = st.builds(LostInNoise, patience=st.integers(1, 9), level=reals(0.01, 0.99))
    return TrainQuery(
        spec=spec,
        strategy=draw(st.builds(FedAvg, rate=reals(0.01, 10), average_from=start) | momentum),
        adaptive=draw(st.none() | adaptive),
        canaries=draw(st.sampled_from([0, 20, 200])),
        stop=draw(st.none() | stop),
    )


@st.composite
def evaluations(draw: st.DrawFn) -> EvaluateQuery:
    """Any evaluation."""
    spec = draw(specs())
    edges = st.lists(reals(-50, 50), min_size=2, max_size=5, unique=True).map(
        lambda one: tuple(sorted(one))
    )
    reach = spec.label.high - spec.label.low
    return EvaluateQuery(
        spec=spec,
        bins=draw(st.integers(2, 128)),
        subgroups=tuple(
            draw(st.lists(st.builds(Subgroup, column=columns, edges=edges), max_size=3))
        ),
        examples=draw(st.integers(1, 4096)),
        largest_error=draw(st.none() | reals(0.01, 0.5)) if reach > 1 else None,
        called=draw(names),
    )


def read(declared: Mapping[str, Any]) -> object:
    """As it comes from a study: through JSON."""
    return declared_question(json.dumps(declared, allow_nan=False))


# --- There and back ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(query=trainings())
def test_a_training_is_read_back_as_it_was_declared(query: TrainQuery) -> None:
    assert read(declaration_of(query)) == query


@settings(deadline=None, max_examples=60)
@given(query=evaluations())
def test_an_evaluation_is_read_back_with_all_that_it_asks_by(query: EvaluateQuery) -> None:
    found = read(declaration_of(query))
    assert isinstance(found, EvaluateQuery)
    # How the training works and what it costs is the training's own business.
    assert declaration_of(found) == declaration_of(query)
    assert found.name == query.name
    assert found.columns == query.columns
    assert (found.sensitivity, found.bound) == (query.sensitivity, query.bound)
    assert found.spec.personal == query.spec.personal
    assert found.spec.held_out == query.spec.held_out


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_is_left_out_is_as_the_specification_has_it(spec: TrainSpec) -> None:
    declared = declaration_of(TrainQuery(spec=spec))
    assert not declared.keys() & {"clip", "scale", "strategy", "adaptive", "stop"}
    # No audit is said: a draft that says nothing gets one.
    assert declared["canaries"] == 0
    assert complete([declared]) == [declared]
    assert read(declared) == TrainQuery(spec=spec)


def test_bounds_that_are_left_out_are_the_columns_own() -> None:
    query = learning_from(TRAIN)
    sleep, mood = COLUMNS["sleep_quality"], COLUMNS["mood"]
    (feature,) = query.spec.features
    assert (feature.low, feature.high) == (sleep.low, sleep.high)
    assert (query.spec.label.low, query.spec.label.high) == (mood.low, mood.high)
    own = learning_from({**TRAIN, "features": [{"column": "sleep_quality", "low": 2.0}]})
    assert (own.spec.features[0].low, own.spec.features[0].high) == (2.0, sleep.high)


# --- Strictly ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({**TRAIN, "round": 3}, "Did you mean rounds"),
        ({**TRAIN, "of": "another"}, "'of' is not known"),
        ({**TRAIN, "name": "Low mood"}, "a name is 1 to 64"),
        ({**EVALUATE, "of": "\x1b[2J"}, "a name is 1 to 64"),
        ({**TRAIN, "features": [{"column": "mood", "lags": 1}]}, "Did you mean lag"),
        ({**TRAIN, "features": [{"column": "moood"}]}, "Did you mean mood"),
        ({**TRAIN, "features": [{}]}, "needs a `column`"),
        ({**TRAIN, "features": {"column": "mood"}}, "list of tables"),
        ({**TRAIN, "label": {"column": "mood", "belov": 1.0}}, "Did you mean below"),
        ({**TRAIN, "label": {"column": "mood", "below": 1, "at_least": 1}}, "not both"),
        ({**TRAIN, "work": {"epoch": 1}}, "Did you mean epochs"),
        ({**TRAIN, "personal": {"olde": 0.5}}, "Did you mean older"),
        ({**TRAIN, "adaptive": {"quantil": 0.5}}, "Did you mean quantile"),
        ({**TRAIN, "stop": {"patients": 3}}, "Did you mean patience"),
        ({**TRAIN, "strategy": {"kind": "fedavgm", "momentu": 0.5}}, "Did you mean momentum"),
        ({**TRAIN, "strategy": {"kind": "fedavg", "momentum": 0.5}}, "'momentum' is not known"),
        ({**TRAIN, "strategy": {"kind": "adam"}}, "fedavg or fedavgm"),
        ({**TRAIN, "strategy": "fedavg"}, "is a table"),
        ({**TRAIN, "canaries": 9000}, "20 to 8192"),
        ({**TRAIN, "canaries": True}, "Expected `int`"),
        ({**TRAIN, "rounds": 0}, "`rounds` 1 to"),
        ({**TRAIN, "rounds": 5, "strategy": {"average_from": 6}}, "beyond the last round"),
        ({**TRAIN, "model": "forest"}, "Invalid enum value"),
        ({key: one for key, one in TRAIN.items() if key != "label"}, "needs `label`"),
        ({**EVALUATE, "bin": 4}, "Did you mean bins"),
        ({**EVALUATE, "rounds": 4}, "'rounds' is not known"),
        ({**EVALUATE, "of": None}, "name of its training"),
        ({**EVALUATE, "held_out": 0.0}, "nobody to ask"),
        ({**EVALUATE, "bins": 1}, "`bins` is 2 to"),
        ({**EVALUATE, "subgroups": [{**SUBGROUP, "edge": 1}]}, "Did you mean edges"),
        ({**EVALUATE, "subgroups": [{**SUBGROUP, "column": "sexx"}]}, "Did you mean sex"),
        ({**EVALUATE, "subgroups": [{**SUBGROUP, "edges": [1.0, 0.0]}]}, "ascending"),
        ({**EVALUATE, "subgroups": SUBGROUP}, "list of tables"),
    ],
)
def test_refuses_what_it_does_not_know_and_says_the_nearest(
    declared: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(ManifestError, match=says):
        read(declared)


def test_refuses_another_kind_than_it_has() -> None:
    with pytest.raises(ManifestError, match="train or evaluate"):
        learning_from({**TRAIN, "kind": "trian"})


#: What JSON can hold, numbers beyond every type and text that is none among it.
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([10**400, 1e308, -1e308, 5e-324])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "mood", "fedavg", "\ud800", "\x1b[2J"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["column", "kind", "rate", "\ud800"]), inner, max_size=2)
    ),
    max_leaves=4,
)
#: Every place in a declaration where something may stand.
PLACES: tuple[tuple[str | int, ...], ...] = (
    *((key,) for key in (
        "kind", "name", "of", "features", "label", "model", "hidden", "steps", "per", "most",
        "work", "clip", "scale", "rounds", "held_out", "personal", "strategy", "adaptive",
        "canaries", "stop", "bins", "subgroups", "examples", "largest_error", "\ud800",
    )),
    *(("features", 0, key) for key in ("column", "low", "high", "lag", "within", "indicator")),
    *(("label", key) for key in ("column", "low", "high", "at_least", "below", "ahead")),
    *(("work", key) for key in ("epochs", "rate", "l2")),
    *(("personal", key) for key in ("steps", "rate", "older")),
    *(("strategy", key) for key in ("kind", "rate", "momentum", "nesterov", "average_from")),
    *(("adaptive", key) for key in ("quantile", "rate", "low", "high")),
    *(("stop", key) for key in ("patience", "level")),
    *(("subgroups", 0, key) for key in ("column", "edges")),
)  # fmt: skip


def placed(base: Mapping[str, Any], place: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """A declaration with something else at one place."""
    match place:
        case (str(key),):
            return {**base, key: value}
        case (str(key), str(inner)):
            return {**base, key: {**base.get(key, {}), inner: value}}
        case (str(key), 0, str(inner)):
            first = SUBGROUP if key == "subgroups" else base[key][0]
            return {**base, key: [{**first, inner: value}]}
    raise AssertionError(place)


def said_of(asks: Sequence[Mapping[str, Any]]) -> str:
    """What a draft of these is refused with, all of it; nothing if it is not."""
    said = ""
    reads: list[Callable[[], object]] = [partial(complete, asks)]
    reads += [partial(learning_from, ask) for ask in asks]
    for read_one in reads:
        try:
            read_one()
        except ManifestError as refusal:
            said += str(refusal)
    return said


@settings(deadline=None, max_examples=400)
@given(base=st.sampled_from([TRAIN, EVALUATE]), place=st.sampled_from(PLACES), value=anything)
def test_whatever_a_declaration_holds_it_is_a_question_or_refused(
    base: Mapping[str, Any], place: tuple[str | int, ...], value: object
) -> None:
    said = said_of([TRAIN, placed(base, place, value)])
    # Said to people: one line, whatever was sent.
    assert said.isprintable()


@pytest.mark.parametrize(
    "declared",
    [
        {**TRAIN, "strategy": {"kind": ["fedavg"]}},
        {**TRAIN, "model": "\ud800"},
        {**TRAIN, "hidden": ["\ud800"]},
        {**EVALUATE, "subgroups": ["\ud800"]},
    ],
)
def test_refuses_what_is_no_text_and_no_name(declared: Mapping[str, Any]) -> None:
    with pytest.raises(ManifestError):
        learning_from(declared)


@pytest.mark.parametrize("key", ["name", "of"])
@pytest.mark.parametrize("value", [["low-mood"], {"low-mood": 1}])
def test_a_draft_whose_evaluation_names_no_name_is_refused(key: str, value: object) -> None:
    assert said_of([TRAIN, {**EVALUATE, key: value}])
    assert said_of([{**TRAIN, "name": value}, EVALUATE])


# --- A training and who judges it ----------------------------------------------------------------


def test_a_draft_that_only_says_of_gets_the_trainings_examples_and_model() -> None:
    training = {**TRAIN, "held_out": 0.3, "per": "day", "personal": {"steps": 2}, "rounds": 9}
    short = {"kind": "evaluate", "name": "how-good", "of": "low-mood", "bins": 4}
    count = {"kind": "count", "name": "c", "column": "mood", "at_least": 1}
    whole = complete([training, short, count])
    assert whole[0] == {**training, "canaries": 1000}
    assert whole[2] == count
    assert "rounds" not in whole[1]
    queries = [learning_from(ask) for ask in whole[:2]]
    assert queries[1].spec.personal == PersonalHead(steps=2)
    assert queries[1].spec.held_out == 0.3
    verify_pairs(queries)


def test_a_training_is_audited_unless_its_draft_says_otherwise() -> None:
    for said, canaries in (({}, 1000), ({"canaries": 0}, 0), ({"canaries": 50}, 50)):
        query = learning_from(complete([{**TRAIN, **said}])[0])
        assert isinstance(query, TrainQuery)
        assert query.canaries == canaries
    # Where sites add the noise no canary would find any.
    site = complete([{**TRAIN, "at_site": {"rate": 0.5, "steps": 2}}])[0]
    assert "canaries" not in site


def test_a_draft_that_judges_no_training_of_its_own_is_refused() -> None:
    for of in ("low-moon", None, 3):
        with pytest.raises(ManifestError, match="There are: low-mood"):
            complete([TRAIN, {"kind": "evaluate", "name": "e", "of": of}])
    with pytest.raises(ManifestError, match="none"):
        complete([{"kind": "evaluate", "name": "e", "of": "low-mood"}])


@pytest.mark.parametrize(
    "other",
    [
        {"features": [{"column": "sleep_quality", "lag": 1}]},
        {"label": {"column": "mood", "below": 2.0}},
        {"model": "mlp", "hidden": [3]},
        {"per": "person"},
        {"most": 3},
        {"held_out": 0.5},
        {"personal": {}},
    ],
)
def test_an_evaluation_by_other_examples_model_or_people_is_refused(
    other: Mapping[str, Any],
) -> None:
    training = learning_from(TRAIN)
    verify_pairs([training, learning_from(EVALUATE)])
    with pytest.raises(ManifestError, match="how-good is of no training"):
        verify_pairs([training, learning_from({**EVALUATE, **other})])


def test_an_evaluation_of_a_training_that_is_not_asked_before_it_is_refused() -> None:
    """It starts from the weights, and there are none yet: it would be approved, and never asked."""
    training, evaluation = learning_from(TRAIN), learning_from(EVALUATE)
    verify_pairs([training, evaluation])
    with pytest.raises(ManifestError, match="before"):
        verify_pairs([evaluation, training])
    with pytest.raises(ManifestError, match="of no training"):
        verify_pairs([evaluation])
