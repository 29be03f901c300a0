"""The folders are the architecture: who may import whom, and what every subpackage must have."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROLE_FOLDERS = ("protos", "services", "workers", "clients")

EVERYTHING = frozenset(
    {"v1", "wire", "traces", "client", "datasets", "interchange", "report", "demo", "cli"}
) | {
    "cluster",
    "fleet",
    "teacher",
    "rollouts",
    "student",
    "export",
}
MAY_IMPORT = {
    "v1": frozenset[str](),
    "wire": frozenset({"v1"}),
    "traces": frozenset({"wire", "v1"}),
    "cluster": frozenset({"wire"}),
    "fleet": frozenset({"traces", "wire", "cluster"}),
    "client": frozenset({"wire", "v1"}),
    "teacher": frozenset({"wire", "client", "v1", "cluster"}),
    "rollouts": frozenset({"wire", "client", "teacher"}),
    "student": frozenset({"wire", "client", "rollouts", "cluster"}),
    "export": frozenset({"wire"}),
    "interchange": frozenset({"v1", "wire", "client"}),
    "datasets": frozenset({"wire", "client"}),
    "report": frozenset({"wire", "student"}),
    "demo": EVERYTHING - {"v1", "traces", "fleet", "cli"},
    "cli": EVERYTHING,
}
"""Subpackages of ours, besides itself, that a subpackage may import."""

MUST_NOT_LOAD = {
    "wire": frozenset({"grpc", "torch", "ray", "vllm", "transformers"}),
    "client": frozenset({"torch", "ray", "vllm", "transformers"}),
    "export": frozenset({"grpc", "ray", "vllm"}),
    "interchange": frozenset({"torch", "ray", "vllm"}),
    "datasets": frozenset({"ray", "vllm", "transformers"}),
    "report": frozenset({"grpc", "torch", "ray", "vllm", "transformers"}),
}
"""Packages of others that a subpackage does without."""

SUBPACKAGES = {
    path.name: path
    for folder in ROLE_FOLDERS
    for path in sorted((ROOT / folder / "lynearm").iterdir())
    if path.is_dir() and path.name != "__pycache__"
}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names of all modules that a source file imports, wherever in it and by whatever statement."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            # `from lynearm import wire` names the module last.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "lynearm" else (base,)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (name for name in names if isinstance(name, str))


def breaches(source: str, subpackage: str, package: str | None = None) -> set[str]:
    """Modules that this source may not import, being in that subpackage."""
    found = set[str]()
    allowed = MAY_IMPORT[subpackage] | {subpackage}
    for module in imported_modules(source, package or f"lynearm.{subpackage}"):
        top, _, rest = module.partition(".")
        if top == "lynearm" and rest.split(".")[0] not in allowed:
            found.add(module)
        if top in MUST_NOT_LOAD.get(subpackage, ()):
            found.add(module)
    return found


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_subpackage_imports_only_what_lies_below_it(subpackage: str) -> None:
    assert subpackage in MAY_IMPORT, f"say in this test what {subpackage} may import"
    for path in sorted(SUBPACKAGES[subpackage].rglob("*.py")):
        package = "lynearm." + ".".join(path.relative_to(SUBPACKAGES[subpackage].parent).parts[:-1])
        found = breaches(path.read_text(), subpackage, package)
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


@pytest.mark.parametrize(
    "statement",
    [
        "import lynearm.traces.store",
        "from lynearm.traces.store import BlockStore",
        "from lynearm import traces",
        "from ..traces import store",
        "def read():\n    from lynearm.traces import reader",
        "import importlib\nimportlib.import_module('lynearm.traces')",
        "if TYPE_CHECKING:\n    from lynearm.traces import reader",
    ],
)
def test_every_way_to_import_the_service_is_noticed(statement: str) -> None:
    assert breaches(statement, "student")
    assert not breaches(statement, "cli")


def test_heavy_packages_in_the_wire_are_noticed() -> None:
    assert breaches("import torch.nn as nn", "wire") == {"torch.nn"}
    assert not breaches("import numpy", "wire")


def test_no_file_takes_the_place_of_the_namespace() -> None:
    assert not [folder for folder in ROLE_FOLDERS if (ROOT / folder / "lynearm" / "__init__.py").exists()]


def test_no_subpackage_is_split_over_two_folders() -> None:
    folders = [
        path.name
        for folder in ROLE_FOLDERS
        for path in (ROOT / folder / "lynearm").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_subpackage_says_what_it_is_and_has_types(subpackage: str) -> None:
    folder = SUBPACKAGES[subpackage]
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert (folder / "py.typed").exists()
