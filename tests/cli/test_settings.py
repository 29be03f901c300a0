from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from lynearm.cli.options import weights
from lynearm.cli.settings import TABLES, load_settings, read_table
from lynearm.demo.config import DemoConfig
from lynearm.export.config import CoreMlExportConfig, MlxExportConfig
from lynearm.fleet.config import FleetConfig
from lynearm.student.config import TrainConfig
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.toml"))

CONFIG_CLASSES: Mapping[str, Any] = {
    "serve": ServeConfig,
    "up": FleetConfig,
    "teach": TeachConfig,
    "teacher.serve": ServeTeacherConfig,
    "train": TrainConfig,
    "export.mlx": MlxExportConfig,
    "export.coreml": CoreMlExportConfig,
    "demo": DemoConfig,
}

WORKABLE_VALUES: Mapping[str, object] = {
    "model": "m",
    "prompts": "p.jsonl",
    "stream": "s",
    "license": "Apache-2.0",
    "checkpoint": Path("c"),
    "out": Path("o"),
}


def required_values(config_class: Any) -> dict[str, Any]:
    """Something for every field without a default."""
    return {
        one.name: WORKABLE_VALUES[one.name]
        for one in fields(config_class)
        if one.default is MISSING and one.default_factory is MISSING
    }


@dataclass(frozen=True, slots=True)
class Sample:
    """A field of each type that the roles use."""

    path: Path = Path("a")
    whole: int = 1
    number: float = 1.0
    flag: bool = False
    word: Literal["x", "y"] = "x"
    text: str = "t"
    maybe: int | None = 0
    numbers: tuple[int, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    mixed: Mapping[str, bool | float | str] = field(default_factory=dict[str, bool | float | str])


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "lynearm.toml"
    file.write_text(text)
    return file


def load(file: Path | None = None, **more: object) -> Sample:
    return load_settings(Sample, "serve", file=file, **more)  # type: ignore[arg-type]  # options by name


@pytest.fixture(autouse=True)
def _no_service_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LYNEARM_SERVICE", raising=False)


def test_there_are_example_files() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
@pytest.mark.parametrize("table", TABLES)
def test_shipped_examples_load(file: Path, table: str) -> None:
    assert read_table(file, table), f"the example shows nothing about {table}"
    arguments = required_values(CONFIG_CLASSES[table]) if table.startswith("export.") else {}
    assert load_settings(CONFIG_CLASSES[table], table, file=file, flags=arguments)


@pytest.mark.parametrize("table", TABLES)
def test_an_absent_file_gives_the_defaults_of_the_dataclass(table: str) -> None:
    config_class = CONFIG_CLASSES[table]
    required = required_values(config_class)
    assert load_settings(config_class, table, flags=required) == config_class(**required)


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "[serve]\nport = 1\nhost = 'localhost'\n")
    settings = load_settings(ServeConfig, "serve", file=file, flags={"port": 2, "host": None})
    assert (settings.port, settings.host, settings.data_dir) == (2, "localhost", ServeConfig().data_dir)


def test_assignments_override_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "[serve]\nwhole = 1\n")
    assert load(file, flags={"whole": 2}, assignments=["whole=3"]).whole == 3


def test_the_environment_names_the_service_unless_file_or_flag_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LYNEARM_SERVICE", "env:1")
    file = write(tmp_path, "[train]\nservice = 'file:2'\n")
    assert load_settings(TrainConfig, "train").service == "env:1"
    assert load_settings(TrainConfig, "train", file=file).service == "file:2"
    assert load_settings(TrainConfig, "train", file=file, flags={"service": "flag:3"}).service == "flag:3"


def test_values_of_every_type_arrive_as_their_type(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [serve]
        path = "b/c"
        whole = 7
        number = 2
        flag = true
        word = "y"
        text = "u"
        maybe = "none"
        numbers = [1, 2]
        labels = { team = "a" }
        """,
    )
    loaded = load(file)
    assert loaded == Sample(Path("b/c"), 7, 2.0, True, "y", "u", None, (1, 2), {"team": "a"})
    assert isinstance(loaded.number, float)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("path=b c", Sample(path=Path("b c"))),
        ("number=1e-3", Sample(number=1e-3)),
        ("flag=true", Sample(flag=True)),
        ("text=a=b", Sample(text="a=b")),
        ("text=7", Sample(text="7")),
        ("text='7'", Sample(text="7")),
        ("maybe=none", Sample(maybe=None)),
        ("numbers=[3]", Sample(numbers=(3,))),
        ("labels.team=a", Sample(labels={"team": "a"})),
        ("mixed.a=true", Sample(mixed={"a": True})),
        ("mixed.a=0.5", Sample(mixed={"a": 0.5})),
        ("mixed.a=high", Sample(mixed={"a": "high"})),
    ],
)
def test_assignments_are_toml_or_bare_words(assignment: str, expected: Sample) -> None:
    assert load(assignments=[assignment]) == expected


def test_an_assignment_adds_to_a_table_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[serve.labels]\na = '1'\n")
    assert load(file, assignments=["labels.b=2"]).labels == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[serve]\nwhloe = 1\n", r"no key 'whloe'.*did you mean 'whole'"),
        ("[serve]\nwhole = 1.5\n", r"whole is 1\.5, expected a whole number"),
        ("[serve]\nwhole = true\n", r"whole is true, expected a whole number"),
        ("[serve]\nnumber = 'fast'\n", r"number is 'fast', expected a number"),
        ("[serve]\nflag = 'yes'\n", r"flag is 'yes', expected true or false"),
        ("[serve]\nword = 'z'\n", r"word is 'z', expected one of 'x' and 'y'"),
        ("[serve]\npath = 3\n", r"path is 3, expected a path"),
        ("[serve]\nnumbers = 3\n", r"numbers is 3, expected a list"),
        ("[serve]\nlabels = 3\n", r"labels is 3, expected a table"),
        ("[serve.labels]\nteam = []\n", r"labels\.team is \[\], expected a text"),
        ("[serve.mixed]\na = []\n", r"mixed\.a is \[\], expected a text, a number, true or false"),
        ("[sreve]\n", r"no table \[sreve\].*did you mean 'serve'"),
        ("[export.mxl]\n", r"no table \[export\.mxl\].*did you mean 'export\.mlx'"),
        ("[export]\nbits = 4\n", r"no table \[export\.bits\]"),
        ("port = 1\n", r"'port' stands outside a table"),
        ("[serve\n", r"is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_would_be_right(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [("whole", "is not KEY=VALUE"), ("hwole=1", "did you mean 'whole'"), ("whole=x", "whole is 'x'")],
)
def test_a_wrong_assignment_is_refused(assignment: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(assignments=[assignment])


def test_missing_values_are_named_as_flags() -> None:
    with pytest.raises(ConfigError, match="teach needs prompts and stream: give --prompts and --stream"):
        load_settings(TeachConfig, "teach", flags={"model": "m"})


def test_a_value_out_of_range_is_refused_by_the_role() -> None:
    with pytest.raises(ConfigError, match="port is 70000"):
        load_settings(ServeConfig, "serve", flags={"port": 70_000})


def test_losses_and_weights_come_from_flags_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lynearm.toml"
    file.write_text(
        '[train]\nloss = ["jsd@0.3:0.9", "cross-entropy:0.1"]\n'
        "span_weights = { reasoning = 0.5 }\n"
        'tag_weights = { "domain=code" = 2 }\n'
    )
    settings = load_settings(TrainConfig, "train", file=file)
    assert settings.loss == ("jsd@0.3:0.9", "cross-entropy:0.1")
    assert settings.span_weights == {"reasoning": 0.5}
    assert settings.tag_weights == {"domain=code": 2.0}
    given = {
        "loss": ["reverse-kl"],
        "span_weights": weights(["answer:2", "other:0"], "--span-weight"),
        "tag_weights": weights(None, "--tag-weight"),
    }
    settings = load_settings(TrainConfig, "train", file=file, flags=given)
    assert settings.loss == ("reverse-kl",)
    assert settings.span_weights == {"answer": 2.0, "other": 0.0}
    assert settings.tag_weights == {"domain=code": 2.0}


def test_one_stream_or_several_come_from_a_file_or_flags(tmp_path: Path) -> None:
    one = write(tmp_path, '[train]\nstream = "maths"\n')
    assert load_settings(TrainConfig, "train", file=one).streams == ("maths",)
    given = {"streams": ["maths:0.7", "code:0.3"]}
    assert load_settings(TrainConfig, "train", file=one, flags=given).streams == ("maths:0.7", "code:0.3")
    assert load_settings(TrainConfig, "train", file=one, assignments=["stream=code"]).streams == ("code",)
    several = write(tmp_path, '[train]\nstreams = ["maths:0.7..0.2@100", "code"]\n')
    assert load_settings(TrainConfig, "train", file=several).streams == ("maths:0.7..0.2@100", "code")
    both = write(tmp_path, '[train]\nstream = "maths"\nstreams = ["code"]\n')
    with pytest.raises(ConfigError, match="both 'stream' and 'streams' are given"):
        load_settings(TrainConfig, "train", file=both)
    with pytest.raises(ConfigError, match="0 throughout"):
        load_settings(TrainConfig, "train", flags={"streams": ["maths:0"]})


@pytest.mark.parametrize("wrong", ["reasoning", "reasoning:", "reasoning:half"])
def test_a_weight_that_is_no_number_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--span-weight"):
        weights([wrong], "--span-weight")
