"""Code tables: which codes carry which sensitivity label. Data files with their source beside them.

Each file names the systems it speaks of, how codes match (`exact`, or `prefix`: a code carries the
labels of every prefix that it begins with; `T39??2` leaves two characters open), and codes by
label. A clinic adds its own files; nothing can be taken away. What follows from types alone stands
in `types.toml`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from policies.errors import BundleError, PolicyConfigurationError
from policies.model import LABELS, Confidentiality

BUILT_IN: Final = Path(__file__).with_name("data")
TYPES_FILE: Final = BUILT_IN / "types.toml"

_TELLING: Final = 5
# Every code of a prefix table (ICD-10) starts so; an ordinary word does not.
_CATEGORY = re.compile(r"[A-Z][0-9][0-9A-Z]").match
_SNOMED_EDITION: Final = "http://snomed.info/sct/"
_OID = re.compile(r"[0-2](?:\.[0-9]+){3,}").fullmatch
_NOTHING: Final[frozenset[str]] = frozenset()


class _CodeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    systems: tuple[str, ...]
    match: Literal["exact", "prefix"]
    labels: dict[str, tuple[str, ...]]


class _TypesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    resource_types: dict[str, tuple[str, ...]]
    service_kinds: dict[str, tuple[str, ...]]
    confidentiality: dict[str, Confidentiality]
    implies: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """All tables together. Look-ups do not depend on how many codes there are."""

    #: By normalised system, "" for every system together: codes, and prefixes, with their labels.
    exact: dict[str, dict[str, frozenset[str]]] = field(repr=False)
    prefixes: dict[str, dict[str, frozenset[str]]] = field(repr=False)
    resource_types: dict[str, frozenset[str]] = field(repr=False)
    service_kinds: dict[str, frozenset[str]] = field(repr=False)
    confidentiality: dict[str, Confidentiality] = field(repr=False)
    implies: dict[str, frozenset[str]] = field(repr=False)

    def find(self, system: str, code: str) -> frozenset[str]:
        """Labels of one code. Without a system, of any code that is written so in any table."""
        key = _system(system)
        labels = _NOTHING
        exact = self.exact.get(key)
        # A short number without a system may be anything: a price, a status, a room.
        if exact is not None and (key or len(code) >= _TELLING):
            labels = exact.get(code.strip().upper(), _NOTHING)
        prefixes = self.prefixes.get(key)
        bare = _bare(code)
        if prefixes is not None and _CATEGORY(bare):
            for length in range(1, min(len(bare), 8) + 1):
                labels |= prefixes.get(bare[:length], _NOTHING)
            # ICD-10-CM says in the sixth character whether harm was meant, and to whom.
            labels |= prefixes.get(f"{bare[:3]}??{bare[5:6]}", _NOTHING)
        return labels


def load_tables(directories: Sequence[Path] = ()) -> Tables:
    """Read the built-in tables and every `*.toml` file in `directories`.

    Raises `BundleError` naming the file, or `PolicyConfigurationError`.
    """
    files = [file for file in _files(BUILT_IN) if file != TYPES_FILE]
    files += [file for folder in directories for file in _files(folder)]
    types = _convert(TYPES_FILE, _TypesFile)
    tables = Tables(
        exact={},
        prefixes={},
        resource_types=_inverted(types.resource_types),
        service_kinds=_inverted(types.service_kinds),
        confidentiality=types.confidentiality,
        implies={label: frozenset(others) for label, others in types.implies.items()},
    )
    for file in files:
        _add(tables, _convert(file, _CodeFile), str(file))
    return tables


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PolicyConfigurationError(
            f"There is no folder {folder}. Make it, or correct policies.tables_directory."
        )
    return sorted(folder.glob("*.toml"))


def _convert[T](file: Path, kind: type[T]) -> T:
    try:
        raw: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        return msgspec.convert(raw, kind)
    except OSError as error:
        raise PolicyConfigurationError(f"Cannot read {file}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BundleError(str(file), f"is not a code table: {error}.") from error


def _add(tables: Tables, file: _CodeFile, where: str) -> None:
    unknown = set(file.labels) - set(LABELS)
    if unknown:
        raise BundleError(where, f"there is no label “{min(unknown)}”; use {', '.join(LABELS)}.")
    kind = tables.exact if file.match == "exact" else tables.prefixes
    for system in {"", *map(_system, file.systems)}:
        codes = kind.setdefault(system, {})
        for label, listed in file.labels.items():
            for code in listed:
                key = code.strip().upper() if file.match == "exact" else _bare(code)
                if not key:
                    raise BundleError(where, f"an empty code under “{label}”.")
                codes[key] = codes.get(key, _NOTHING) | {label}


def _inverted(labels: dict[str, tuple[str, ...]]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for label, names in labels.items():
        for name in names:
            found[name] = found.get(name, _NOTHING) | {label}
    return found


def _system(system: str) -> str:
    """One spelling for a system: apps differ in case, scheme, last slash, version and edition."""
    bare = system.partition("|")[0].strip().rstrip("/").lower().replace("https://", "http://", 1)
    if bare.startswith(_SNOMED_EDITION):
        return _SNOMED_EDITION.rstrip("/")
    return f"urn:oid:{bare}" if _OID(bare) else bare


def _bare(code: str) -> str:
    return code.strip().upper().replace(".", "").replace(" ", "")
