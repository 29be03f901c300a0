"""Where models come from: directories, a hub that speaks the real one's language, GGUF files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models.model_hub import HubModel, ModelHub, directory_files
from teacher.test_gguf_models import write_tiny_gguf

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.licenses import license_of_card
from lynearm.teacher.model_source import (
    LICENSE_LABEL,
    find_model_files,
    pin_model,
    prepare_model,
    source_kind,
)
from lynearm.wire.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

OLD, NEW = "a" * 40, "b" * 40
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


def make_config(model: object, **overrides: Any) -> TeachConfig:
    return TeachConfig(str(model), "p", "s", **overrides)


@pytest.fixture
def hub(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[ModelHub]:
    from huggingface_hub import constants

    files = directory_files(tiny_model)
    models = {
        "acme/tiny": HubModel(
            {OLD: files, NEW: {**files, "README.md": CARD, "model.onnx": b"unwanted"}},
            {"main": NEW, "v1": OLD},
        ),
        "acme/secret": HubModel({}, gated=True),
        "acme/old": HubModel({OLD: {"config.json": b"{}", "pytorch_model.bin": b"pickled"}}, {"main": OLD}),
    }
    with ModelHub(models) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield served


def test_a_branch_becomes_a_commit_whose_files_come_once_and_no_others(
    hub: ModelHub, tiny_model: Path
) -> None:
    pinned = pin_model(make_config("acme/tiny"))
    assert (pinned.revision, pinned.model_name, pinned.license) == (NEW, "acme/tiny", "Apache-2.0")
    assert pinned.labels == {LICENSE_LABEL: "model card"}
    assert hub.fetched == ["acme/tiny/config.json", "acme/tiny/README.md"]
    described = find_model_files(pinned)
    assert described is not None
    assert (described / "tokenizer.json").is_file()
    assert "acme/tiny/model.safetensors" not in hub.fetched
    prepared = prepare_model(pinned)
    assert prepared.revision == NEW
    assert (prepared.directory / "model.safetensors").read_bytes() == (
        tiny_model / "model.safetensors"
    ).read_bytes()
    assert "acme/tiny/model.onnx" not in hub.fetched
    assert len(hub.fetched) == len(set(hub.fetched))


def test_a_tag_pins_and_a_model_without_a_card_has_no_known_licence(
    hub: ModelHub, caplog: pytest.LogCaptureFixture
) -> None:
    pinned = pin_model(make_config("acme/tiny", revision="v1"))
    assert (pinned.revision, pinned.license) == (OLD, "unknown")
    assert pinned.labels == {LICENSE_LABEL: "none found"}
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "\n" not in warning.getMessage()
    assert "licence of acme/tiny is unknown" in warning.getMessage()
    given = pin_model(make_config("acme/tiny", revision="v1", license="MIT", model_name="mine"))
    assert (given.license, given.labels, given.model_name) == ("MIT", {}, "mine")


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        ("acme/none", "", "there is no directory 'acme/none' here, and no model of that name in the hub"),
        ("acme/secret", "", "model 'acme/secret' is gated: accept its terms at"),
        ("acme/tiny", "v9", "model 'acme/tiny' has no revision 'v9': check --revision"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_refuses_is_refused_in_a_line_with_the_remedy(
    model: str, revision: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        pin_model(make_config(model, revision=revision))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("hub")
def test_a_model_without_safetensors_is_refused() -> None:
    with pytest.raises(ConfigError, match="no weights in safetensors were found for model 'acme/old'"):
        prepare_model(pin_model(make_config("acme/old", license="MIT")))


def test_without_a_network_the_copy_that_is_here_is_used(
    hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    prepare_model(pin_model(make_config("acme/tiny")))
    # As HF_HUB_OFFLINE=1 does; without it the client tries for half a minute before it gives up.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pinned = pin_model(make_config("acme/tiny"))
    assert (pinned.revision, pinned.license) == (NEW, "Apache-2.0")
    assert prepare_model(pinned).revision == NEW
    with pytest.raises(
        ConfigError, match="no copy of a model of the hub of that name, and the hub cannot be"
    ):
        pin_model(make_config("acme/other"))


def test_a_directory_is_itself_and_its_card_says_the_licence(tmp_path: Path) -> None:
    directory = tmp_path / "teacher"
    directory.mkdir()
    (directory / "README.md").write_bytes(CARD)
    pinned = pin_model(make_config(directory))
    assert (pinned.model_name, pinned.license, pinned.revision) == ("teacher", "Apache-2.0", "")
    assert prepare_model(pinned).directory == directory
    with pytest.raises(ConfigError, match=r"revision 'v1' of .*which is no model of the hub"):
        pin_model(make_config(directory, revision="v1"))


def test_a_path_that_is_not_here_is_refused_unless_a_worker_may_have_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        pin_model(make_config(tmp_path / "none"))
    with pytest.raises(ConfigError, match="there is no file"):
        pin_model(make_config(tmp_path / "none.gguf"))
    elsewhere = make_config(tmp_path / "none", license="MIT")
    assert pin_model(elsewhere) == elsewhere
    with pytest.raises(ConfigError, match="every machine with a worker"):
        prepare_model(elsewhere)


def test_a_gguf_file_is_converted_once_and_named_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tiny_gguf(tmp_path / "Tiny Model.gguf")
    pinned = pin_model(make_config(path))
    assert (pinned.model_name, pinned.license) == ("Tiny Model", "Apache-2.0")
    assert pinned.labels == {LICENSE_LABEL: "GGUF metadata"}
    assert not (tmp_path / "cache").exists(), "pinning converts nothing"
    prepared = prepare_model(pinned)
    assert prepared.revision == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert (prepared.directory / "model.safetensors").is_file()
    assert prepare_model(pinned) == prepared
    path.write_bytes(b"GGML")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        pin_model(make_config(path))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("gpt2", "hub"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hub"),
        ("/models/teacher", "directory"),
        ("./teacher", "directory"),
        ("a/b/c", "directory"),
        ("~/teacher", "directory"),
        ("files/x.gguf", "gguf"),
    ],
)
def test_a_name_says_where_it_points(model: str, kind: str) -> None:
    assert source_kind(model) == kind


def test_a_directory_beside_us_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert source_kind("acme/tiny") == "directory"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "Apache-2.0"),
        ("---\r\nlicense: MIT\r\n---\r\ntext", "MIT"),
        ('---\nlanguage: [en]\nlicense: "cc-by-nc-4.0"  # not for sale\n---\n', "CC-BY-NC-4.0"),
        ("---\nlicense: llama3.2\n---\n", "LicenseRef-llama3.2"),
        ("---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.y/L\n---\n", "https://x.y/L"),
        ("---\nlicense: other\nlicense_name: my terms\nlicense_link: LICENSE\n---\n", "LicenseRef-my-terms"),
        ("---\nlicense: other\n---\n", ""),
        ("---\nlicense: unknown\n---\n", ""),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "MIT AND Apache-2.0"),
        ("---\nlicense:\n---\n", ""),
        ("---\nlicense: [mit\n---\n", ""),
        ("---\n- license\n---\n", ""),
        ("# license: mit\n", ""),
        ("text\n---\nlicense: mit\n---\n", ""),
        ("", ""),
    ],
)
def test_a_card_names_a_licence_or_nothing(card: str, expected: str) -> None:
    assert license_of_card(card) == expected
