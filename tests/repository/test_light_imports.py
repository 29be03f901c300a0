"""`--help` and the SDK answer at once: they import nothing of what a role needs to work."""

import json
import subprocess
import sys

import pytest
import typer.main

HEAVY = {
    "torch",
    "vllm",
    "ray",
    "transformers",
    "mlx",
    "mlx_lm",
    "coremltools",
    "accelerate",
    "gguf",
    "pyarrow",
}

VERBS = [
    ("serve",),
    ("up",),
    ("down",),
    ("teach",),
    ("teacher", "serve"),
    ("teacher", "profile"),
    ("teacher", "attention"),
    ("train",),
    ("student", "lineage"),
    ("student", "report"),
    ("student", "cut"),
    ("student", "merge"),
    ("export", "mlx"),
    ("export", "coreml"),
    ("streams", "list"),
    ("streams", "show"),
    ("streams", "tail"),
    ("streams", "export"),
    ("streams", "retain"),
    ("streams", "collect"),
    ("streams", "delete"),
    ("tokens", "new"),
    ("tokens", "list"),
    ("import",),
    ("demo",),
]

REPORT = """
import json, sys
modules = sorted({name.split(".")[0] for name in sys.modules})
print("\\n" + json.dumps({"exit": exit_code, "modules": modules}))
"""

RUN_COMMAND = """
import sys
from lynearm.cli.main import main
try:
    main()
    exit_code = 0
except SystemExit as end:
    exit_code = end.code or 0
"""


def loaded_by(code: str, *arguments: str) -> tuple[int, set[str], str]:
    """Exit code, top-level modules and output of a piece of code in an interpreter of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code + REPORT, *arguments], check=True, capture_output=True, text=True
    )
    report = json.loads(result.stdout.splitlines()[-1])
    return report["exit"], set(report["modules"]), result.stdout


@pytest.mark.parametrize(
    "verb", [(), ("export",), ("streams",), ("tokens",), ("teacher",), *VERBS], ids=" ".join
)
def test_help_loads_nothing_heavy(verb: tuple[str, ...]) -> None:
    exit_code, modules, output = loaded_by(RUN_COMMAND, *verb, "--help")
    assert exit_code == 0
    assert "Usage: " + " ".join(("lynearm", *verb)) in output
    assert not modules & HEAVY


def test_help_tests_cover_every_verb() -> None:
    from lynearm.cli.main import app

    def leaves(command: object, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        children: dict[str, object] = getattr(command, "commands", {})
        if not children:
            return {path}
        return {leaf for name, child in children.items() for leaf in leaves(child, (*path, name))}

    assert leaves(typer.main.get_command(app)) == set(VERBS)


@pytest.mark.parametrize("module", ["lynearm.wire", "lynearm.wire.codec", "lynearm.client"])
def test_sdk_loads_nothing_heavy(module: str) -> None:
    _, modules, _ = loaded_by(f"import {module}\nexit_code = 0")
    assert "lynearm" in modules
    assert not modules & (HEAVY | {"sqlalchemy", "typer", "rich"})


def test_heavy_imports_are_noticed() -> None:
    _, modules, _ = loaded_by("import gguf\nexit_code = 0")
    assert "gguf" in modules & HEAVY
