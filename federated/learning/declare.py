"""Training and evaluation from a declaration, and back: what a study's file says of a model.

    kind = "train"                              kind = "evaluate"
    name = "low-mood"                           name = "how-good"
    label = { column = "mood", below = 1.5 }    of = "low-mood"
    features = [{ column = "sleep_quality" }]   subgroups = [{ column = "sex", edges = [...] }]
    rounds = 20

`model` is logistic (the default), linear, mlp or gru. Bounds that are left out are the column's own
in the daily table. An evaluation repeats what the training says of examples and model, so that each
question stands for itself; `complete` fills that in where a draft only says `of`. It also finds the
`factors` of a training by `turns` where a draft says how many: `turns = { gap = 8, bands = 8 }`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from federated.errors import ImportDataError, ManifestError
from federated.learning.at_site import AtSite
from federated.learning.clipping import AdaptiveClip
from federated.learning.evaluate import EvaluateQuery, Subgroup
from federated.learning.factorisation import MAX_BANDS, optimised
from federated.learning.models import parameters
from federated.learning.norms import UpdateNorms
from federated.learning.round_query import DEFAULT_CANARIES, TrainQuery
from federated.learning.spec import Feature, Label, PersonalHead, TrainSpec, Work
from federated.learning.strategies import FedAvg, FedAvgM, LostInNoise
from federated.learning.turns import Turns
from federated.node.columns import column as column_of

TRAIN: Final = "train"
EVALUATE: Final = "evaluate"
NORMS: Final = "norms"
KINDS: Final = (TRAIN, EVALUATE, NORMS)
_STRATEGIES: Final[Mapping[str, type[FedAvg | FedAvgM]]] = {"fedavg": FedAvg, "fedavgm": FedAvgM}
_SPEC: Final = tuple(field.name for field in dataclasses.fields(TrainSpec) if field.name != "kind")
_OWN_PARTS: Final = (
    ("adaptive", AdaptiveClip), ("stop", LostInNoise), ("turns", Turns), ("at_site", AtSite),
)  # fmt: skip
#: What an evaluation repeats: examples and model, and who is held out.
_SHARED: Final = (
    "features", "label", "model", "hidden", "steps", "per", "most", "held_out", "personal",
)  # fmt: skip
_TRAIN_KEYS: Final = (
    *_SPEC, "model", "strategy", "adaptive", "canaries", "stop", "turns", "at_site",
)  # fmt: skip
_EVALUATE_KEYS: Final = ("name", "of", *_SHARED, "bins", "subgroups", "examples", "largest_error")
#: What the length of an update depends on.
_WORKED: Final = (*_SHARED[:-2], "personal", "work")
_NORMS_KEYS: Final = ("name", *_WORKED, "low", "high", "bins", "at")
#: As a study has them: what else stands there is no name, and is not shown to anybody.
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}").fullmatch


def learning_from(ask: Mapping[str, Any]) -> TrainQuery | EvaluateQuery | UpdateNorms:
    """A question of one of `KINDS` from its declaration. Raises `ManifestError`, in one line."""
    given = dict(ask)
    kind = given.pop("kind", None)
    if kind == TRAIN:
        return _training(given)
    if kind == EVALUATE:
        return _evaluation(given)
    if kind == NORMS:
        return _norms(given)
    raise ManifestError(f"A question of learning is of kind {' or '.join(KINDS)}.")


def declaration_of(query: TrainQuery | EvaluateQuery | UpdateNorms) -> dict[str, Any]:
    """What `learning_from` makes the same question from: plain values, defaults left out."""
    spec = _without_defaults(query.spec)
    spec["model"] = spec.pop("kind", None)
    if isinstance(query, EvaluateQuery):
        own = _without_defaults(query)
        del own["spec"]
        own.pop("called", None)
        shared: dict[str, Any] = {str(key): spec.get(key) for key in _SHARED}
        named = {"kind": EVALUATE, "name": query.name, "of": query.spec.name}
        declared = {**named, **shared, **own}
    elif isinstance(query, UpdateNorms):
        own = _without_defaults(query)
        worked: dict[str, Any] = {str(key): spec[key] for key in _WORKED if key in spec}
        declared = {"kind": NORMS, **worked, **{k: one for k, one in own.items() if k != "spec"}}
    else:
        declared = {"kind": TRAIN, **spec, **_parts(query)}
    return {key: value for key, value in declared.items() if value is not None}


def complete(asks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A draft's declarations, with what each evaluation leaves to the training that it is `of`.

    And with the factors of trainings by turns, and canaries for those that say nothing of an audit:
    a study that wants none says `canaries = 0`. Raises `ManifestError` for an evaluation of no
    training of this study, or of another model.
    """
    asks = [_with_canaries(_with_factors(ask)) for ask in asks]
    trainings = {
        ask["name"]: ask for ask in asks if ask.get("kind") == TRAIN and _is_name(ask.get("name"))
    }
    completed = []
    for ask in asks:
        if ask.get("kind") != EVALUATE:
            completed.append(dict(ask))
            continue
        of = ask.get("of")
        training = trainings.get(of) if isinstance(of, str) else None
        if training is None:
            raise ManifestError(
                f"The evaluation {str(ask.get('name'))[:64]!r}: `of` names no training of this "
                f"study. There are: {', '.join(sorted(trainings)) or 'none'}."
            )
        shared = {key: training[key] for key in _SHARED if key in training}
        completed.append({**shared, **ask})
    return completed


def _with_factors(ask: Mapping[str, Any]) -> Mapping[str, Any]:
    """A training's declaration in which `bands` of its `turns` has become the best `factors`.

    They are found once, here, and declared: another machine might round them otherwise.
    """
    turns = ask.get("turns")
    if ask.get("kind") != TRAIN or not isinstance(turns, Mapping) or "bands" not in turns:
        return ask
    given = dict(turns)
    bands = given.pop("bands")
    if "factors" in given or type(bands) is not int or not 1 <= bands <= MAX_BANDS:
        raise ManifestError(f"`turns` has `factors`, or `bands` of 1 to {MAX_BANDS}, not both.")
    # All else is checked as it would be with the simplest factors.
    query = _training({**_without(ask, "kind"), "turns": {**given, "factors": [1]}})
    momentum = query.strategy.momentum if isinstance(query.strategy, FedAvgM) else 0.0
    found = optimised(min(bands, query.rounds), query.participation, momentum=momentum)
    return {**ask, "turns": {**given, "factors": list(found.coefficients)}}


def _with_canaries(ask: Mapping[str, Any]) -> Mapping[str, Any]:
    if ask.get("kind") != TRAIN or "canaries" in ask or "at_site" in ask:
        return ask
    return {**ask, "canaries": DEFAULT_CANARIES}


def _without(ask: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in ask.items() if name != key}


def verify_pairs(queries: Iterable[object]) -> None:
    """Each evaluation judges a training that the study asks before it.

    With its examples, model and people. Raises `ManifestError`.
    """
    trained: dict[str, TrainSpec] = {}
    for one in queries:
        if isinstance(one, TrainQuery):
            trained[one.name] = one.spec
        elif isinstance(one, EvaluateQuery):
            spec = trained.get(one.spec.name)
            if spec is None or _examples(spec) != _examples(one.spec):
                raise ManifestError(
                    f"{one.name} is of no training of this study that stands before it, or has "
                    "other examples, another model or other people held out than that."
                )


def _examples(spec: TrainSpec) -> tuple[object, ...]:
    return tuple(getattr(spec, "kind" if key == "model" else key) for key in _SHARED)


def _training(given: dict[str, Any]) -> TrainQuery:
    what = "A training"
    _refuse_unknown(given, _TRAIN_KEYS, what)
    parts: dict[str, Any] = {}
    if "strategy" in given:
        parts["strategy"] = _strategy(given.pop("strategy"))
    for key, kind in _OWN_PARTS:
        if key in given:
            parts[key] = _convert(given.pop(key), kind, f"{what}: `{key}`")
    if "canaries" in given:
        parts["canaries"] = _convert(given.pop("canaries"), int, f"{what}: `canaries`")
    return TrainQuery(spec=_spec(given, what), **parts)


def _evaluation(given: dict[str, Any]) -> EvaluateQuery:
    what = "An evaluation"
    _refuse_unknown(given, _EVALUATE_KEYS, what)
    shared: dict[str, Any] = {str(key): given.pop(key) for key in _SHARED if key in given}
    name = given.pop("name", None)
    of = given.pop("of", None)
    if not isinstance(name, str) or not isinstance(of, str):
        raise ManifestError(f"{what} needs a `name`, and `of`: the name of its training.")
    _verify_name(name, what)
    spec = _spec({**shared, "name": of}, what)
    if not spec.held_out > 0:
        raise ManifestError(f"{name}: nobody is held out, so there is nobody to ask.")
    subgroups = tuple(
        _convert(one, Subgroup, f"{what}: a subgroup")
        for one in _list(given.pop("subgroups", ()), f"{what}: `subgroups`")
    )
    for subgroup in subgroups:
        _known(subgroup.column)
    query = _convert(
        {**given, "called": name, "spec": spec, "subgroups": subgroups}, EvaluateQuery, what
    )
    # What cannot be asked is refused by the question that would be.
    query.at(np.zeros(parameters(spec)))
    return query


def _norms(given: dict[str, Any]) -> UpdateNorms:
    what = "A question of kind norms"
    _refuse_unknown(given, _NORMS_KEYS, what)
    worked = {str(key): given.pop(key) for key in _WORKED if key in given}
    spec = _spec({**worked, "name": given.get("name")}, what)
    return _convert({**given, "spec": spec}, UpdateNorms, what)


def _spec(given: Mapping[str, Any], what: str) -> TrainSpec:
    filled = dict(given)
    for key in ("name", "features", "label"):
        if key not in filled:
            raise ManifestError(f"{what} needs `{key}`.")
    _verify_name(filled["name"], what)
    filled["features"] = [
        _convert(_bounded(one, f"{what}: a feature"), Feature, f"{what}: a feature")
        for one in _list(filled["features"], f"{what}: `features`")
    ]
    filled["label"] = _convert(_bounded(filled["label"], f"{what}: `label`"), Label, what)
    for key, kind in (("work", Work), ("personal", PersonalHead)):
        if key in filled:
            filled[key] = _convert(filled[key], kind, f"{what}: `{key}`")
    if "model" in filled:
        filled["kind"] = filled.pop("model")
    return _convert(filled, TrainSpec, what)


def _is_name(given: object) -> bool:
    return isinstance(given, str) and _NAME(given) is not None


def _verify_name(given: object, what: str) -> None:
    if not _is_name(given):
        raise ManifestError(f"{what}: a name is 1 to 64 of a-z, 0-9, _ and -, a letter first.")


def _bounded(given: object, what: str) -> dict[str, Any]:
    """A column with the bounds that it has in the daily table where it says none."""
    if not isinstance(given, Mapping) or not isinstance(given.get("column"), str):
        raise ManifestError(f"{what} needs a `column`.")
    known = _known(given["column"])
    return {"low": known[0], "high": known[1], **given}


def _list(given: object, what: str) -> Sequence[object]:
    if not isinstance(given, (list, tuple)):
        raise ManifestError(f"{what} is a list of tables.")
    return given


def _known(name: str) -> tuple[float, float]:
    try:
        column = column_of(name)
    except ImportDataError as error:
        raise ManifestError(str(error)) from error
    return column.low, column.high


def _strategy(given: object) -> FedAvg | FedAvgM:
    what = "A training: `strategy`"
    if not isinstance(given, Mapping):
        raise ManifestError(f"{what} is a table.")
    named = dict(given)
    kind = named.pop("kind", "fedavg")
    if not isinstance(kind, str) or kind not in _STRATEGIES:
        raise ManifestError(
            f"{what} is of kind {' or '.join(_STRATEGIES)}, not {str(kind)[:64]!r}."
        )
    return _convert(named, _STRATEGIES[kind], what)


def _parts(query: TrainQuery) -> dict[str, Any]:
    """What a training declares beside its specification."""
    own = _without_defaults(query)
    del own["spec"]
    if query.at_site is None:
        # None is said, too: where nothing is said, a draft gets some.
        own["canaries"] = query.canaries
    if "strategy" in own:
        kind = next(name for name, cls in _STRATEGIES.items() if type(query.strategy) is cls)
        own["strategy"] = {"kind": kind, **_without_defaults(query.strategy)}
    return own


def _without_defaults(value: Any) -> dict[str, Any]:
    """A dataclass as plain values, without what is as its class has it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if one != field.default:
            found[field.name] = _plain(one)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return _without_defaults(value) if dataclasses.is_dataclass(value) else value


def _convert[T](given: object, kind: type[T], what: str) -> T:
    try:
        unknown = given.keys() - _fields(kind) if isinstance(given, Mapping) else frozenset()
        if unknown:
            raise ManifestError(_unknown(what, min(map(str, unknown)), _fields(kind)))
        return msgspec.convert(given, type=kind)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{what}: {error}.") from error
    except UnicodeEncodeError as error:
        raise ManifestError(f"{what} holds what is no text.") from error


def _fields(kind: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise ManifestError(_unknown(what, str(key), known))


def _unknown(what: str, key: str, known: Iterable[str]) -> str:
    listed = list(known)
    near = difflib.get_close_matches(key, listed, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(sorted(listed))}."
    return f"{what}: the key {key[:64]!r} is not known.{hint}"
