"""Job files: several teachers and which prompts each of them answers. TOML.

    assign = "first-match"          # or "all": every teacher whose rule matches

    [teach]                         # what the teachers have in common: keys of `TeachConfig`
    prompts = "prompts.jsonl"
    stream = "lessons"

    [[teacher]]                     # in the order in which rules are tried
    name = "maths"
    when = { topic = ["maths", "physics"] }
    model = "models/maths"          # and any other key of `TeachConfig`
    license = "Apache-2.0"

    [[teacher]]                     # without `when`: whatever is left
    name = "general"
    model = "models/general"
    license = "MIT"

Here is what the file says; `lynearm.teacher.several` makes it work.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lynearm.teacher.routing import RouteRule, RoutingTable
from lynearm.wire.errors import ConfigError, InvalidInputError
from lynearm.wire.specs import check_name

MAX_TEACHERS = 32
"""Each takes a label of its stream, of which there may be 64."""

TEACHER_PLACE = "{teacher}"
"""In the name of a stream: a stream for each teacher."""

_ASSIGNMENTS = ("first-match", "all")
_TOP_KEYS = ("assign", "teach", "teacher")


@dataclass(frozen=True, slots=True)
class TeacherEntry:
    """One teacher of a job file."""

    name: str
    settings: Mapping[str, object]
    """Keys of `TeachConfig` that are this teacher's own, as TOML gives them."""
    where: str
    """Where it stands; for messages to people."""


@dataclass(frozen=True, slots=True)
class JobFile:
    """What a job file says."""

    table: RoutingTable
    common: Mapping[str, object]
    """Keys of `TeachConfig` that all teachers have in common."""
    common_where: str
    teachers: tuple[TeacherEntry, ...]
    """In the file's order."""

    def settings_of(self, teacher: TeacherEntry) -> tuple[tuple[str, Mapping[str, object]], ...]:
        """Tables that make a teacher's `TeachConfig`, each with where it stands; the later one overrides."""
        tables = ((self.common_where, self.common), (teacher.where, teacher.settings))
        return tuple((where, _named(settings, teacher.name)) for where, settings in tables)


def load_job_file(path: Path) -> JobFile:
    """Read a job file.

    Raises:
        ConfigError: if it cannot be read, or `parse_job_file` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read job file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"job file {path} is not UTF-8 at byte {error.start}") from error
    return parse_job_file(text, name=str(path))


def parse_job_file(text: str, *, name: str) -> JobFile:
    """What a job file says; the keys of `TeachConfig` are checked by whoever makes one.

    Args:
        text: TOML.
        name: Of the file, for messages.

    Raises:
        ConfigError: naming the file, the table and what would be right.
    """
    try:
        document: dict[str, object] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}", "see https://toml.io for the syntax") from error
    for key in document:
        if key not in _TOP_KEYS:
            raise ConfigError(
                f"{name}: there is no key {key!r} in a job file",
                "use assign, [teach] for what the teachers have in common, and [[teacher]] for each of them",
            )
    assign = document.get("assign", _ASSIGNMENTS[0])
    if assign not in _ASSIGNMENTS:
        raise ConfigError(f"{name}: assign is {assign!r}, expected one of {', '.join(_ASSIGNMENTS)}")
    parsed = [
        _teacher(entry, f"{name} [[teacher]] {number}")
        for number, entry in enumerate(_tables(document.get("teacher", []), name), start=1)
    ]
    if len(parsed) > MAX_TEACHERS:
        raise ConfigError(f"{name}: {len(parsed)} teachers, at most {MAX_TEACHERS} may be")
    return JobFile(
        table=RoutingTable(tuple(rule for rule, _ in parsed), everyone=assign == "all"),
        common=_table(document.get("teach", {}), f"{name} [teach]"),
        common_where=f"{name} [teach]",
        teachers=tuple(teacher for _, teacher in parsed),
    )


def _named(settings: Mapping[str, object], teacher: str) -> Mapping[str, object]:
    stream = settings.get("stream")
    if not isinstance(stream, str):
        return settings
    return {**settings, "stream": stream.replace(TEACHER_PLACE, teacher)}


def _teacher(entry: Mapping[str, object], where: str) -> tuple[RouteRule, TeacherEntry]:
    name = entry.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{where}: name is {name!r}, expected a text", 'such as name = "maths"')
    try:
        check_name(name, what="teacher")
    except InvalidInputError as error:
        raise ConfigError(f"{where}: {error.message}", error.remedy) from error
    where = f"{where} ({name})"
    when = {
        key: _values(value, f"{where}: when.{key}")
        for key, value in _table(entry.get("when", {}), f"{where}: when").items()
    }
    settings = {key: value for key, value in entry.items() if key not in ("name", "when")}
    return RouteRule(name, when), TeacherEntry(name, settings, where)


def _values(value: object, where: str) -> frozenset[str]:
    listed = cast("list[object]", value) if isinstance(value, list) else [value]
    if not listed or not all(isinstance(one, str) and one for one in listed):
        raise ConfigError(f"{where} is {value!r}, expected a text or a list of texts")
    return frozenset(cast("list[str]", listed))


def _tables(value: object, name: str) -> list[Mapping[str, object]]:
    if not isinstance(value, list):
        raise ConfigError(
            f"{name}: [teacher] is one table, expected a list", "write [[teacher]], once for each"
        )
    return [_table(entry, f"{name} [[teacher]]") for entry in cast("list[object]", value)]


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, expected a table")
    return cast("Mapping[str, object]", value)
