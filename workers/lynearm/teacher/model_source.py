"""Where a teacher's model comes from: a directory, the Hugging Face hub, or a GGUF file.

`pin_model` says once, on the machine where the command runs, which weights are meant and under which terms;
`prepare_model` brings them onto the machine of a worker, as a directory in the transformers layout.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.licenses import UNKNOWN_LICENSE, license_of_card, license_of_fields
from lynearm.wire.errors import ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""The module huggingface_hub, whose functions have too many overloads for a strict checker."""

SourceKind: TypeAlias = Literal["directory", "hub", "gguf"]

LICENSE_LABEL = "license-source"
"""Label of a stream whose licence nobody gave: where it was read, or that it was found nowhere."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CARD_BYTES = 1 << 20
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""What a model in the transformers layout consists of; other formats of the same weights are left out."""


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model on this machine."""

    directory: Path
    """In the transformers layout."""
    revision: str
    """Names the exact weights where their origin does: the hub's commit, or "sha256:" and the digest of the
    GGUF file. Empty for a directory, whose weights are to be digested."""


def source_kind(model: str) -> SourceKind:
    """What a model's name means. A name that could be both is a directory where there is one."""
    if model.endswith(".gguf"):
        return "gguf"
    is_name = _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()
    return "hub" if is_name else "directory"


def pin_model(config: TeachConfig) -> TeachConfig:
    """The config with the model's commit, name and licence filled in; asks the hub, and loads no weights.

    A licence that nobody names becomes "unknown", with a warning and the label `LICENSE_LABEL`.

    Raises:
        ConfigError: if there is no such model or revision, or a revision is named of something without.
        CheckpointError: if a GGUF file is none.
        MissingDependencyError: without huggingface_hub, for a model of the hub.
    """
    kind = source_kind(config.model)
    if kind != "hub" and config.revision:
        raise ConfigError(
            f"revision {config.revision!r} of {config.model!r}, which is no model of the hub",
            "leave --revision out: files on a disk are named by their digest",
        )
    if kind == "hub":
        commit = _find_commit(config.model, config.revision)
        pinned = replace(config, revision=commit, model_name=config.model_name or config.model)
        return _with_license(pinned, "model card", lambda: _hub_license(config.model, commit))
    path = Path(config.model).expanduser()
    if not path.exists():
        if config.license:
            # The machine of a worker may have it.
            return config
        raise ConfigError(
            f"there is no {'file' if kind == 'gguf' else 'directory'} {config.model!r} here",
            "check --model; where only the workers' machines have it, give --license",
        )
    name = config.model_name or (path.stem if kind == "gguf" else path.resolve().name)
    named = replace(config, model_name=name)
    if kind == "gguf":
        return _with_license(named, "GGUF metadata", lambda: _gguf_license(path))
    return _with_license(named, "model card", lambda: _directory_license(path))


def prepare_model(config: TeachConfig) -> PreparedModel:
    """The model of a config on this machine: downloaded or converted if it is not there.

    Raises:
        ConfigError: if there is no such model or revision.
        CheckpointError, StorageError, StorageFullError: as for `convert_gguf`.
        MissingDependencyError: without huggingface_hub, or what a GGUF file needs.
    """
    kind = source_kind(config.model)
    if kind == "hub":
        return _download(config.model, config.revision)
    path = Path(config.model).expanduser()
    if not path.exists():
        raise ConfigError(
            f"there is no {'file' if kind == 'gguf' else 'directory'} {config.model!r} on this machine",
            "check --model, and that every machine with a worker has it",
        )
    if kind == "gguf":
        from lynearm.teacher.gguf_models import convert_gguf, default_cache_dir, gguf_digest

        return PreparedModel(convert_gguf(path, default_cache_dir()), f"sha256:{gguf_digest(path)}")
    return PreparedModel(path, "")


def find_model_files(config: TeachConfig) -> Path | None:
    """A directory with the configuration and the tokenizer of a pinned model; None where there is none here.

    Fetches those files of a model of the hub, without its weights; converts no GGUF file.
    """
    kind = source_kind(config.model)
    if kind == "directory":
        path = Path(config.model).expanduser()
        return path if path.is_dir() else None
    if kind == "gguf" or not _COMMIT.fullmatch(config.revision):
        return None
    hub = _import_hub()
    names = [name for name in _HUB_FILES if name != "*.safetensors"]
    try:
        return Path(hub.snapshot_download(config.model, revision=config.revision, allow_patterns=names))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        logger.debug("no files of %s here: %s", config.model, error)
        return None


def _with_license(config: TeachConfig, source: str, read: Callable[[], str]) -> TeachConfig:
    if config.license:
        return config
    found = read()
    if not found:
        logger.warning(
            "the licence of %s is unknown: its stream will say so, unless you give --license", config.model
        )
    labels = {**config.labels, LICENSE_LABEL: source if found else "none found"}
    return replace(config, license=found or UNKNOWN_LICENSE, labels=labels)


def _directory_license(directory: Path) -> str:
    card = directory / "README.md"
    if not card.is_file():
        return ""
    with card.open("rb") as file:
        return license_of_card(file.read(_CARD_BYTES).decode("utf-8", "replace"))


def _gguf_license(path: Path) -> str:
    from lynearm.teacher.gguf_file import read_gguf_metadata

    gguf = read_gguf_metadata(path)
    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    return license_of_fields({ours: gguf.text_if_any(f"general.{theirs}") for ours, theirs in keys.items()})


def _hub_license(repository: str, commit: str) -> str:
    hub = _import_hub()
    try:
        card = hub.hf_hub_download(repository, "README.md", revision=commit)
    # No card, or no way to it: then nothing is known, which the stream says.
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        logger.debug("no card of %s: %s", repository, error)
        return ""
    return _directory_license(Path(card).parent)


def _find_commit(repository: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    hub = _import_hub()
    try:
        # The client keeps the file in a directory named by its commit, and what the branch stood for, so that
        # it answers the same without a network.
        return Path(hub.hf_hub_download(repository, "config.json", revision=revision or None)).parent.name
    except hub.errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"there is no directory {repository!r} here, no copy of a model of the hub of that name, and the "
            f"hub cannot be asked: {_first_line(error.__cause__ or error)}",
            "check --model and the network",
        ) from error
    except (hub.errors.HfHubHTTPError, OSError) as error:
        raise _refused(hub, repository, revision, error) from error


def _download(repository: str, revision: str) -> PreparedModel:
    hub = _import_hub()
    # A commit never changes: what is here already needs no network.
    directory = _snapshot(hub, repository, revision, local_only=True)
    if directory is None or not any(directory.glob("*.safetensors")):
        directory = _snapshot(hub, repository, revision, local_only=False)
    if directory is None or not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"no weights in safetensors were found for model {repository!r} at {revision or 'its main branch'}",
            "name a model, or a revision of it, that has them; check the network",
        )
    return PreparedModel(directory, directory.name)


def _snapshot(hub: Untyped, repository: str, revision: str, *, local_only: bool) -> Path | None:
    """The directory of a commit, which it is named by; None where it is not here and `local_only`."""
    try:
        return Path(
            hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(_HUB_FILES),
                local_files_only=local_only,
            )
        )
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        if local_only:
            return None
        raise _refused(hub, repository, revision, error) from error


def _refused(hub: Untyped, repository: str, revision: str, error: Exception) -> ConfigError:
    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, hub.errors.GatedRepoError):
        return ConfigError(
            f"model {repository!r} is gated",
            f"accept its terms at https://huggingface.co/{repository}, and log in with `hf auth login`",
        )
    if isinstance(error, hub.errors.RevisionNotFoundError):
        return ConfigError(f"model {repository!r} has no revision {revision!r}", "check --revision")
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return ConfigError(
            f"there is no directory {repository!r} here, and no model of that name in the hub that you may "
            "see",
            "check --model; for a private one, log in with `hf auth login`",
        )
    return ConfigError(
        f"model {repository!r}{at} cannot be fetched: {_first_line(error)}", "check the network and try again"
    )


def _import_hub() -> Untyped:
    try:
        module: Untyped = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise MissingDependencyError(
            f"models of the hub need huggingface_hub: {error}",
            "pip install 'lynearm[teacher]' or 'lynearm[teacher-cpu]'",
        ) from error
    return module


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
