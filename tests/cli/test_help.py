"""What a person sees before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.demo.config import DemoConfig
from lynearm.export.config import CoreMlExportConfig, MlxExportConfig
from lynearm.interchange.config import ImportConfig
from lynearm.student.config import TrainConfig
from lynearm.student.objective import DEFAULT_LOSS
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.traces.config import ServeConfig

HEAVY = (
    "torch",
    "vllm",
    "ray",
    "transformers",
    "mlx",
    "coremltools",
    "pyarrow",
    "grpc",
    "numpy",
    "google.protobuf",
    "rich",
)

COMMANDS = (
    (),
    ("serve",),
    ("up",),
    ("down",),
    ("teach",),
    ("teacher",),
    ("teacher", "serve"),
    ("teacher", "profile"),
    ("teacher", "attention"),
    ("train",),
    ("student",),
    ("student", "lineage"),
    ("student", "report"),
    ("student", "cut"),
    ("student", "merge"),
    ("export",),
    ("export", "mlx"),
    ("export", "coreml"),
    ("streams",),
    ("streams", "list"),
    ("streams", "show"),
    ("streams", "tail"),
    ("streams", "export"),
    ("streams", "retain"),
    ("streams", "collect"),
    ("streams", "delete"),
    ("tokens",),
    ("tokens", "new"),
    ("tokens", "list"),
    ("import",),
    ("demo",),
)

CONFIG_CLASSES: dict[tuple[str, ...], type[Any]] = {
    ("serve",): ServeConfig,
    ("teach",): TeachConfig,
    ("teacher", "serve"): ServeTeacherConfig,
    ("train",): TrainConfig,
    ("export", "mlx"): MlxExportConfig,
    ("export", "coreml"): CoreMlExportConfig,
    ("import",): ImportConfig,
    ("demo",): DemoConfig,
}

NOT_SETTINGS = {"config", "assignments", "progress", "debug", "checkpoint", "teachers", "only"}
"""What is no field; a checkpoint and where its package goes are arguments of the exporters themselves."""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from lynearm.cli.main import app\n"
        f"for command in {COMMANDS!r}:\n"
        "    try:\n"
        "        app([*command, '--help'], prog_name='lynearm')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, (command, end.code)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", CONFIG_CLASSES, ids=" ".join)
def test_every_flag_is_a_field_of_the_configuration(command: tuple[str, ...]) -> None:
    found: Any = get_command(app)  # Any: groups and commands share no typed way down
    for name in command:
        found = found.commands[name]
    parameters: set[str] = {parameter.name for parameter in found.params} - NOT_SETTINGS
    if command[0] == "export":
        parameters.remove("out")
    fields = {field.name for field in dataclasses.fields(CONFIG_CLASSES[command])}
    assert parameters <= fields, "a flag that no field takes would be dropped in silence"


@pytest.mark.parametrize("command", CONFIG_CLASSES, ids=" ".join)
def test_help_tells_the_defaults_of_the_configuration(command: tuple[str, ...]) -> None:
    found: Any = get_command(app)
    for name in command:
        found = found.commands[name]
    defaults: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(CONFIG_CLASSES[command])
    }
    if command == ("train",):
        defaults["loss"] = DEFAULT_LOSS  # An empty one stands for it.
    for parameter in found.params:
        told, default = getattr(parameter, "show_default", None), defaults.get(parameter.name)
        if not isinstance(told, str) or isinstance(default, Path) or default is None:
            continue
        if isinstance(default, tuple):
            assert told == " and ".join(default), parameter.name
        elif isinstance(default, bool):
            assert told.startswith("no-") != default, parameter.name
        else:
            assert type(default)(told) == default, parameter.name


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["serv"])
    assert result.exit_code == 2
    assert "No such command 'serv'" in result.output


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lynearm.cli.main", "--help"], capture_output=True, text=True, check=True
    )
    assert "teach" in done.stdout
