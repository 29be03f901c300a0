"""Nothing in the repository knows the machine it was written on, or where packages are served."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
    ]
]
"""Joined here, so that this file holds none of them."""

FORBIDDEN = re.compile(
    r"(?<![\w.~$}-])/(?:work|tmp|root|home|Users)/\w[\w./-]*|" + "|".join(map(re.escape, REGISTRY_HOSTS))
)


def files_of_the_repository() -> list[Path]:
    """Tracked files and those about to be; skips in a tree that was exported without its history."""
    try:
        top = subprocess.check_output(
            ["git", "rev-parse", "--show-toplevel"], cwd=ROOT, stderr=subprocess.DEVNULL, text=True
        )
        if Path(top.strip()).resolve() != ROOT:
            pytest.skip("this tree lies in another repository")
        listing = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git repository here: the files of an export cannot be told from what ran in it")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def findings(text: str) -> list[str]:
    return [match.group() for match in FORBIDDEN.finditer(text)]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = list[str]()
    files = files_of_the_repository()
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {what}" for what in findings(text)]
    assert len(files) > 50
    assert not found, "\n".join(found)


@pytest.mark.parametrize("start", ["work", "tmp", "root", "home", "Users"])
def test_machine_paths_are_found(start: str) -> None:
    assert findings(f'open("/{start}/someone/data.npz")') == [f"/{start}/someone/data.npz"]


@pytest.mark.parametrize("host", REGISTRY_HOSTS)
def test_registry_hosts_are_found(host: str) -> None:
    assert findings(f"--index-url https://{host}/simple")


@pytest.mark.parametrize(
    "parts",
    [
        ("tests", "work", "a.py"),
        ("~", "home", "x"),
        ("$PREFIX", "tmp", "x"),
        ("#!", "usr", "bin", "env bash"),
    ],
)
def test_other_paths_are_left_alone(parts: tuple[str, ...]) -> None:
    assert not findings("/".join(parts))
