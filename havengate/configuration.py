"""The one configuration file and the environment on top of it.

Each package owns a frozen section (`keys.settings`, `audit.settings`, …); here they are read,
checked as a whole and located on disk. An unknown key fails with the nearest right name: a misspelt
limit must not turn into a default. Nothing here opens a file that a setting names.

Order, last wins: defaults, `havengate.toml`, variables such as `HAVENGATE_KEYS__VAULT__ADDRESS`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec

from audit.settings import AuditSettings
from federated.settings import FederatedSettings
from gateway.settings import GatewaySettings
from havengate.errors import ConfigurationError
from keys.settings import KeysSettings
from policies.settings import PoliciesSettings

DEFAULT_FILE = "havengate.toml"
FILE_VARIABLE = "HAVENGATE_CONFIG"
PREFIX = "HAVENGATE_"
_SQLITE = "sqlite:///"


class Configuration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set."""

    #: Name of the organisation whose people these are. Keys and pseudonyms of tenants never meet.
    tenant: str = "clinic"
    keys: KeysSettings = KeysSettings()
    audit: AuditSettings = AuditSettings()
    policies: PoliciesSettings = PoliciesSettings()
    gateway: GatewaySettings = GatewaySettings()
    federated: FederatedSettings = FederatedSettings()


def load(path: Path | None, environ: Mapping[str, str], *, needed: bool = False) -> Configuration:
    """Read the configuration.

    `path` (or `HAVENGATE_CONFIG`) must exist when named; otherwise `havengate.toml` in the working
    directory is read if it is there. Where it is not, and no variable sets anything either, the
    defaults are given, or refused if a configuration is `needed`. Raises `ConfigurationError`, one
    line for the first mistake.
    """
    if path is None and environ.get(FILE_VARIABLE):
        path = Path(environ[FILE_VARIABLE])
    if path is None and Path(DEFAULT_FILE).exists():
        path = Path(DEFAULT_FILE)
    if needed and path is None and not any(name.startswith(PREFIX) for name in environ):
        raise ConfigurationError(
            f"There is no {DEFAULT_FILE} in {Path.cwd()}. Go to the folder where it lies, name it "
            "with --config, or write a first one with havengate init."
        )
    raw = {} if path is None else _read(path)
    where = "the environment" if path is None else str(path)
    _refuse_unknown(raw, Configuration, prefix="", where=where)
    _lay_environment_on_top(raw, environ)
    try:
        settings = msgspec.convert(raw, Configuration, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}. Correct it and start again.") from error
    base = (Path.cwd() / path).parent if path is not None else Path.cwd()
    return _located(settings, base.resolve())


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            # What a gateway hands down to its own processes.
            return dict(msgspec.json.decode(text, type=dict[str, Any]))
        return tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot read {path}: {error.strerror}. Name the right file with --config."
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}.") from error


def _refuse_unknown(raw: Mapping[str, Any], kind: type, *, prefix: str, where: str) -> None:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in raw.items():
        if key not in known:
            raise ConfigurationError(f"{where}: unknown key “{prefix}{key}”.{_hint(key, known)}")
        section = _section(known[key])
        if section is not None and isinstance(value, Mapping):
            _refuse_unknown(value, section, prefix=f"{prefix}{key}.", where=where)
        member = _member(known[key])
        if member is not None and isinstance(value, list):
            for place, item in enumerate(value, start=1):
                if isinstance(item, Mapping):
                    _refuse_unknown(item, member, prefix=f"{prefix}{key}[{place}].", where=where)


def _hint(key: str, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if nearest:
        return f" Did you mean “{nearest[0]}”?"
    return f" Known here: {', '.join(sorted(known))}."


def _section(annotation: object) -> type[msgspec.Struct] | None:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    return None


def _member(annotation: object) -> type[msgspec.Struct] | None:
    """The kind of the sections in a list of sections, such as `[[gateway.routes]]`."""
    if get_origin(annotation) is not tuple:
        return None
    return _section(get_args(annotation)[0])


def _lay_environment_on_top(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE:
            continue
        names = variable.removeprefix(PREFIX).lower().split("__")
        if not _leads_to_value(Configuration, names):
            raise ConfigurationError(
                f"The environment variable {variable} names no setting. Sections and keys are "
                f"joined by two underscores, as in {PREFIX}KEYS__VAULT__ADDRESS."
            )
        table = raw
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigurationError(
                    f"The environment variable {variable} sets a key of “{name}”, which the file "
                    "gives a value instead of a section. Correct the file and start again."
                )
        table[names[-1]] = environ[variable]


def _leads_to_value(kind: type[msgspec.Struct], names: list[str]) -> bool:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    if names[0] not in known:
        return False
    section = _section(known[names[0]])
    if section is None:
        return len(names) == 1
    return len(names) > 1 and _leads_to_value(section, names[1:])


def _located[S: msgspec.Struct](settings: S, base: Path) -> S:
    """Make every relative path absolute, so that the working directory never matters again."""
    changes: dict[str, Any] = {}
    for field in msgspec.structs.fields(type(settings)):
        value = getattr(settings, field.name)
        kind = _located_as(field.type)
        if isinstance(value, msgspec.Struct):
            changes[field.name] = _located(value, base)
        elif kind == "path" and value:
            changes[field.name] = str(base / Path(value).expanduser())
        elif kind == "url":
            changes[field.name] = _located_url(value, base, field.name)
        elif _member(field.type) is not None:
            changes[field.name] = tuple(_located(item, base) for item in value)
        elif get_origin(field.type) is dict and _section(get_args(field.type)[1]) is not None:
            changes[field.name] = {key: _located(item, base) for key, item in value.items()}
    return msgspec.structs.replace(settings, **changes)


def _located_as(annotation: object) -> str | None:
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, msgspec.Meta) and extra.extra:
            return extra.extra.get("located")
    return None


def _located_url(value: str, base: Path, name: str) -> str:
    plain = value.removeprefix(_SQLITE)
    if plain != value and plain and not set(plain) & set("?%#"):
        return f"{_SQLITE}{base / plain}"
    # Most commands need no database, so the library is loaded for what only it can read.
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        # The value may hold a password: neither it nor the error that quotes it goes on.
        raise ConfigurationError(
            f"“{name}” is not a database URL. Write sqlite:///PATH or postgresql+psycopg://HOST/NAME."
        ) from None
    if url.get_backend_name() not in {"sqlite", "postgresql"}:
        raise ConfigurationError(f"“{name}” must be an SQLite or PostgreSQL URL.")
    if url.get_backend_name() == "sqlite" and url.database:
        url = url.set(database=str(base / url.database))
    return url.render_as_string(hide_password=False)
