"""Makes a role's configuration out of its defaults, a TOML file and flags, each overriding the one before.

The dataclasses of the roles say which keys there are, of which type, with which default; nothing is
repeated here. Paths in a file are relative to the working directory, as those in flags are.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from lynearm.cli.options import SERVICE_VARIABLE
from lynearm.wire.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TABLES = ("serve", "up", "teach", "teacher.serve", "train", "export.mlx", "export.coreml", "demo")
"""Tables that a configuration file may hold; a dot is a table inside a table."""

_Fields: TypeAlias = Mapping[str, dataclasses.Field[Any]]

_Config = TypeVar("_Config", bound="DataclassInstance")


def load_settings(
    config_class: type[_Config],
    table: str,
    *,
    file: Path | None = None,
    tables: Sequence[tuple[str, Mapping[str, object]]] = (),
    flags: Mapping[str, object] | None = None,
    assignments: Sequence[str] = (),
) -> _Config:
    """A role's configuration.

    Args:
        config_class: The role's frozen dataclass.
        table: Its table in the file, one of `TABLES`.
        file: A TOML file; other tables in it are left to other roles.
        tables: Tables from elsewhere, each with where it stands; they override the file, later ones earlier.
        flags: Values by field name; None, and names that are no fields, mean that nothing was said.
        assignments: "key=value" for any field, the value in TOML or a bare word.

    Raises:
        ConfigError: naming the file, the table or the key, and what would be right.
    """
    # A field whose metadata says that it is not settable is made by programs.
    fields = {
        field.name: field
        for field in dataclasses.fields(config_class)
        if field.metadata.get("settable", True)
    }
    given: dict[str, object] = {}
    if "service" in fields and os.environ.get(SERVICE_VARIABLE):
        given["service"] = os.environ[SERVICE_VARIABLE]
    if file is not None:
        given |= _known_keys(read_table(file, table), fields, f"{file} [{table}]")
    for where, entries in tables:
        given |= _known_keys(entries, fields, where)
    given |= {name: value for name, value in (flags or {}).items() if name in fields and value is not None}
    for assignment in assignments:
        _assign(given, assignment, fields)
    hints = get_type_hints(config_class)
    values = {name: _convert(value, hints[name], name) for name, value in given.items()}
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise ConfigError(
            f"{table} needs {_listed(missing)}",
            f"give {_listed([_flag(name) for name in missing])}, or set "
            f"{'it' if len(missing) == 1 else 'them'} in [{table}] of a file named with --config",
        )
    return config_class(**values)


def read_table(file: Path, table: str) -> dict[str, object]:
    """One table of a configuration file; empty when the file leaves it out.

    Raises:
        ConfigError: if the file cannot be read, is not TOML, or holds a table that no role has.
    """
    try:
        document: dict[str, object] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror}", "name a TOML file with --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", "see https://toml.io for the syntax") from error
    _check_tables(document, file)
    found: object = document
    for part in table.split("."):
        found = cast("Mapping[str, object]", found).get(part, {})
    return dict(cast("Mapping[str, object]", found))


def _check_tables(document: Mapping[str, object], file: Path) -> None:
    parents = {table.split(".")[0] for table in TABLES if "." in table}
    for name, value in document.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{file}: {name!r} stands outside a table", f"put it under one of {_tables()}")
        inner = (
            [f"{name}.{key}" for key in cast("Mapping[str, object]", value)] if name in parents else [name]
        )
        for full_name in inner:
            if full_name not in TABLES:
                raise ConfigError(
                    f"{file}: there is no table [{full_name}]",
                    _nearest(full_name, TABLES) or f"use {_tables()}",
                )


def _known_keys(given: Mapping[str, object], fields: _Fields, where: str) -> dict[str, object]:
    known, values = list(fields), _as_lists(given, fields, where)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{where}: there is no key {key!r}", _nearest(key, known) or f"use {_listed(known)}"
            )
    return values


def _as_lists(values: Mapping[str, object], fields: _Fields, where: str) -> dict[str, object]:
    """The values, where a field's metadata names a singular under which a list of one may be given."""
    as_lists = dict(values)
    for name, field in fields.items():
        singular = str(field.metadata.get("singular", ""))
        if singular in values and name in values:
            raise ConfigError(f"{where}: both {singular!r} and {name!r} are given", "give one of them")
        if singular in values:
            as_lists[name] = [as_lists.pop(singular)]
    return as_lists


def _assign(given: dict[str, object], assignment: str, fields: _Fields) -> None:
    key, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--set {assignment!r} is not KEY=VALUE", "for example --set seed=1")
    name, _, entry = key.strip().partition(".")
    ((name, value),) = _known_keys({name: _toml_value(text.strip())}, fields, "--set").items()
    if entry:
        before = given.get(name, {})
        value = {
            **(cast("Mapping[str, object]", before) if isinstance(before, Mapping) else {}),
            entry: value,
        }
    given[name] = value


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(value: object, hint: object, name: str) -> object:
    """The value as the type that a field has.

    Raises:
        ConfigError: if it cannot be one.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "none"):
            return None
        kinds = [one for one in arguments if one is not type(None)]
        if len(kinds) > 1:
            return _expect(value, isinstance(value, tuple(kinds)), name, "a text, a number, true or false")
        return _convert(value, kinds[0], name)
    if origin is Literal:
        return _expect(value, value in arguments, name, f"one of {_listed([repr(one) for one in arguments])}")
    if origin is tuple:
        _expect(value, isinstance(value, list | tuple), name, "a list")
        return tuple(_convert(one, arguments[0], name) for one in cast("Sequence[object]", value))
    if origin is not None and issubclass(origin, Mapping):
        _expect(value, isinstance(value, Mapping), name, "a table")
        entries = cast("Mapping[str, object]", value)
        return {key: _convert(one, arguments[1], f"{name}.{key}") for key, one in entries.items()}
    return _convert_simple(value, hint, name)


def _convert_simple(value: object, hint: object, name: str) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Path:
        return Path(str(_expect(value, isinstance(value, str | Path), name, "a path"))).expanduser()
    if hint is bool:
        return _expect(value, isinstance(value, bool), name, "true or false")
    if hint is int:
        return _expect(value, number and isinstance(value, int), name, "a whole number")
    if hint is float:
        return float(cast("float", _expect(value, number, name, "a number")))
    if hint is str:
        # A bare word in --set may look like a number: `--set producer_id=7`.
        return str(_expect(value, isinstance(value, str | Path) or number, name, "a text"))
    raise TypeError(f"no rule for fields of type {hint}, which {name} has")


def _expect(value: object, holds: bool, name: str, expected: str) -> object:
    if not holds:
        shown = repr(value) if not isinstance(value, bool) else str(value).lower()
        raise ConfigError(f"{name} is {shown}, expected {expected}")
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _tables() -> str:
    return _listed([f"[{table}]" for table in TABLES])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
