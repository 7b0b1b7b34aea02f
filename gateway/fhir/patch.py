"""JSON Patch (RFC 6902) on a record: applied here, to what the one who asks can see.

The app would apply it to ciphertext. Here it is applied to the record as it is shown to this
person: a `test` then tells nothing that a read would not. What is hidden comes back from the prior
version (`gateway.fhir.release.restore_hidden`); an operation that names something hidden is refused
rather than done to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from http import HTTPStatus
from typing import Any, Final

import jsonpatch
import jsonpointer

from gateway.errors import BadRequestError, UnsupportedError
from gateway.fhir.parameters import overlap
from gateway.fhir.resources import Json

MAX_OPERATIONS: Final = 200
#: Each may double the record.
MAX_COPIES: Final = 3
_OPERATIONS: Final = frozenset({"add", "remove", "replace", "move", "copy", "test"})
#: They say again, or hold, what may be hidden elsewhere.
_WHOLE: Final = frozenset({"", "text", "contained"})
_FIXED: Final = frozenset({"resourceType", "id"})


def apply(operations: list[Any], shown: Json, hidden: Collection[str]) -> Json:
    """The record with the patch applied; `shown` stays as it is.

    Raises `BadRequestError` (422 if it does not fit the record), `UnsupportedError` for a path into
    what is hidden.
    """
    if len(operations) > MAX_OPERATIONS:
        raise BadRequestError(f"A patch has at most {MAX_OPERATIONS} operations.")
    copies = sum(isinstance(one, dict) and one.get("op") == "copy" for one in operations)
    if copies > MAX_COPIES:
        raise BadRequestError(f"A patch has at most {MAX_COPIES} operations “copy”.")
    for one in operations:
        for path in _paths(one):
            _check(path, shown["resourceType"], hidden)
    try:
        patched = jsonpatch.JsonPatch(operations).apply(copy.deepcopy(shown))
    except jsonpatch.JsonPatchTestFailed as error:
        raise BadRequestError(
            "A test of the patch failed: the record is not as expected. Read it again.",
            status=HTTPStatus.UNPROCESSABLE_ENTITY,
        ) from error
    except (
        jsonpatch.JsonPatchException,
        jsonpointer.JsonPointerException,
        TypeError,
        ValueError,
        KeyError,
    ) as error:
        raise BadRequestError(
            "The patch does not fit the record. Read it again.",
            status=HTTPStatus.UNPROCESSABLE_ENTITY,
        ) from error
    if not isinstance(patched, dict):
        raise BadRequestError("A patch must leave a resource.")
    return patched


def _paths(operation: Any) -> list[str]:
    """The pointers of an operation. Raises `BadRequestError` if it is none (RFC 6902 section 4)."""
    if not isinstance(operation, dict) or operation.get("op") not in _OPERATIONS:
        raise BadRequestError("Each operation of a patch has op and path (RFC 6902 section 4).")
    needs = ["path", "from"] if operation["op"] in {"move", "copy"} else ["path"]
    paths = [operation.get(name) for name in needs]
    if not all(isinstance(path, str) and (not path or path[0] == "/") for path in paths):
        raise BadRequestError("Paths of a patch are JSON pointers: /name/0/family.")
    if operation["op"] in {"add", "replace", "test"} and "value" not in operation:
        raise BadRequestError("Operations add, replace and test need a value.")
    return [str(path) for path in paths]


def _check(path: str, kind: str, hidden: Collection[str]) -> None:
    names = [one.replace("~1", "/").replace("~0", "~") for one in path.split("/")[1:]]
    if names and names[0] in _FIXED:
        raise BadRequestError("A patch cannot change the type or id of a record.")
    if not hidden:
        return
    words = [one.removeprefix("_") for one in names if not one.isdecimal() and one != "-"]
    dotted = ".".join([kind, *words])
    if not words or words[0] in _WHOLE or any(overlap(dotted, one) for one in hidden):
        raise UnsupportedError("The patch names an element that is not open to you.")
