from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from lynearm.cli.failures import Interrupted, explain, reported
from lynearm.wire.errors import ConfigError, LynearmError, StreamNotFoundError


def run(error: BaseException, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()

    @app.command()
    @reported("type it again")
    def command(debug: bool = False) -> None:
        raise error

    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr


def test_an_error_is_one_line_with_its_remedy() -> None:
    error = StreamNotFoundError("no stream\n'maths'", "`lynearm streams list` shows all")
    assert run(error) == (1, "error: no stream 'maths': `lynearm streams list` shows all\n")


def test_a_wrong_configuration_is_a_usage_error() -> None:
    assert run(ConfigError("port is 70000")) == (2, "error: port is 70000\n")


def test_debug_shows_the_traceback_and_the_line() -> None:
    code, stderr = run(LynearmError("broken"), "--debug")
    assert code == 1
    assert stderr.startswith("Traceback (most recent call last)")
    assert stderr.endswith("error: broken\n")


def test_an_interrupt_says_how_to_go_on() -> None:
    assert run(KeyboardInterrupt()) == (130, "stopped; type it again\n")
    assert run(Interrupted("go there")) == (130, "stopped; go there\n")


@pytest.mark.parametrize(
    ("module", "extra"), [("vllm.engine", "teacher"), ("torch", "student"), ("sqlalchemy", "service")]
)
def test_a_missing_part_names_what_brings_it(module: str, extra: str) -> None:
    code, stderr = run(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert code == 1
    assert f"pip install 'lynearm[{extra}]'" in stderr
    assert stderr.count("\n") == 1


def test_an_operating_system_error_names_the_file() -> None:
    assert explain(FileNotFoundError(2, "No such file or directory", "p.jsonl")) == (
        "error: No such file or directory: p.jsonl",
        1,
    )


def test_an_unexpected_error_is_said_to_be_one() -> None:
    code, stderr = run(ZeroDivisionError("division by zero"))
    assert code == 1
    assert stderr.startswith("error: ZeroDivisionError: division by zero")
    assert "--debug" in stderr
