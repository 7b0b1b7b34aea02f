"""What is done to a resource before it is released: obligations, `_elements`, notices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from gateway.fhir.resources import Json
from policies.obligations import Obligation


def carry_out(
    resource: Json,
    obligations: Iterable[Obligation],
    *,
    masks: frozenset[str],
    pseudonym: Callable[[str, str], str],
) -> Json:
    """Carry out what the rules ask for. `pseudonym` gets the path and the value."""
    raise NotImplementedError


def hidden_paths(
    obligations: Iterable[Obligation], masks: frozenset[str], resource_type: str
) -> frozenset[str]:
    """Paths of the elements that `carry_out` would hide in a resource of this type."""
    raise NotImplementedError


def hidden_parameters(resource_type: str, hidden: frozenset[str]) -> frozenset[str]:
    """Search and sort parameters that would test a hidden element."""
    raise NotImplementedError


def restore_hidden(new: Json, prior: Json, hidden: frozenset[str]) -> Json:
    """`new` with its hidden elements taken from `prior`, whatever `new` says there."""
    raise NotImplementedError


def elements(resource: Json, names: frozenset[str]) -> Json:
    """The part of a resource that `_elements` asks for."""
    raise NotImplementedError


def with_notice(resource: Json, notices: Collection[str]) -> Json:
    """The resource or Bundle with the label that forbids redisclosure."""
    raise NotImplementedError


def notice_text(name: str) -> str:
    """The text of a notice."""
    raise NotImplementedError
