"""`lynearm up` where it cannot: said in one line, before anything starts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.fleet.config import FleetConfig


def test_up_takes_every_flag_of_serve_and_none_that_nobody_reads() -> None:
    commands: Any = get_command(app)  # Any: groups and commands share no typed way down
    flags = {name: {one.name for one in commands.commands[name].params} for name in ("serve", "up")}
    assert flags["serve"] <= flags["up"]
    own = {"ray", "detach", "endpoints_file"} | {one.name for one in dataclasses.fields(FleetConfig)}
    assert flags["up"] - flags["serve"] == own


def refused(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("up",), "`lynearm serve`"),
        (("down",), "`lynearm serve`"),
        (("up", "--ray", "--servers", "2"), "2 servers cannot share catalog and blocks"),
        (("up", "--ray", "--host", "10.0.0.1"), "no TLS"),
        (("up", "--ray", "--set", "cpus=2"), "there is no key 'cpus'"),
        (("up", "--ray", "--ray-address", "ray://head:10001"), "ray job submit"),
    ],
)
def test_what_cannot_be_right_is_a_usage_error(arguments: tuple[str, ...], complaint: str) -> None:
    code, stderr = refused(*arguments)
    assert code == 2
    assert complaint in stderr


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_ray_that_is_not_there_is_named(command: str) -> None:
    code, stderr = refused(command, "--ray", "--ray-address", "127.0.0.1:1")
    assert code == 1
    assert "cannot reach Ray (127.0.0.1:1)" in stderr
    assert "ray start" in stderr


def test_without_the_package_ray_its_extra_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None\nfrom lynearm.cli.main import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", code, "up", "--ray"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'lynearm[ray,service]'" in done.stderr
