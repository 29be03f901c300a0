"""Several teachers: job files, routes, and what the teachers of one stream must share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.teaching import teach_config
from models.tiny_llama import build_tiny_llama

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.job_file import JobFile, load_job_file, parse_job_file
from lynearm.teacher.prompts import MAX_ID_BYTES, Prompt
from lynearm.teacher.routing import (
    PromptRoute,
    RouteRule,
    RoutingTable,
    count_routes,
    original_prompt_id,
)
from lynearm.teacher.run_several import run_several
from lynearm.teacher.several import assign_teachers, prepare_teachers
from lynearm.teacher.shared_streams import (
    join_licenses,
    open_joined,
    refuse_misaligned,
    shared_spec,
    teachers_of,
)
from lynearm.wire.errors import ConfigError, MisalignmentError, StreamExistsError, StreamNotFoundError
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

JOB = """
[teach]
prompts = "prompts.jsonl"
stream = "lessons"
top_k = 16

[[teacher]]
name = "maths"
when = { topic = ["maths", "physics"] }
model = "models/maths"
license = "Apache-2.0"

[[teacher]]
name = "rest"
model = "models/rest"
license = "MIT"
top_k = 32
"""

MATHS = RouteRule("maths", {"topic": frozenset({"maths", "physics"})})
CODE = RouteRule("code", {"topic": frozenset({"code"}), "level": frozenset({"hard"})})
REST = RouteRule("rest")

TAGS = st.dictionaries(
    st.sampled_from(["topic", "level"]), st.sampled_from(["maths", "code", "hard", "easy", "physics"])
)


def prompt(prompt_id: str = "p", **tags: str) -> Prompt:
    return Prompt(prompt_id, "Hi", tags=tags, file="f.jsonl", line=7)


def make_spec(**changes: Any) -> StreamSpec:
    teacher = TeacherSpec("first", "sha256:00", "vllm 0.32.0", "float32", 400, 512)
    tokenizer = TokenizerSpec("first", bytes(32), b"", 384, (2,))
    spec = StreamSpec("lessons", teacher, tokenizer, CodecSpec("standard", 16), "MIT")
    return replace(spec, **changes)


def test_a_job_file_says_who_teaches_what() -> None:
    job = parse_job_file(JOB, name="job.toml")
    assert [rule.teacher for rule in job.table.rules] == ["maths", "rest"]
    assert job.table.teachers_for({"topic": "physics"}) == ("maths",)
    assert job.table.teachers_for({"topic": "art"}) == ("rest",)
    common, own = job.settings_of(job.teachers[1])
    assert common[1] == {"prompts": "prompts.jsonl", "stream": "lessons", "top_k": 16}
    assert own == (
        "job.toml [[teacher]] 2 (rest)",
        {"model": "models/rest", "license": "MIT", "top_k": 32},
    )


def test_a_stream_may_be_named_after_its_teacher() -> None:
    job = parse_job_file(JOB.replace('"lessons"', '"lessons-{teacher}"'), name="job.toml")
    streams = [job.settings_of(teacher)[0][1]["stream"] for teacher in job.teachers]
    assert streams == ["lessons-maths", "lessons-rest"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: "", "the job names no teacher"),
        (lambda text: "[teach", "job.toml is not TOML"),
        (lambda text: "models = 1", "there is no key 'models' in a job file"),
        (lambda text: "assign = 'some'\n" + text, "assign is 'some', expected one of first-match, all"),
        (lambda text: "[teacher]\nname = 'a'", r"\[teacher\] is one table, expected a list"),
        (lambda text: "teach = 1\n[[teacher]]\nname = 'a'", r"\[teach\] is 1, expected a table"),
        (lambda text: text.replace('name = "rest"', ""), r"\[\[teacher\]\] 2: name is None"),
        (lambda text: text.replace('"rest"', '"The Rest"'), "teacher 'The Rest' is not allowed"),
        (lambda text: text.replace('"rest"', '"maths"'), "two teachers are named 'maths'"),
        (lambda text: text.replace('["maths", "physics"]', "[]"), r"when\.topic is \[\], expected a text"),
        (lambda text: text.replace('["maths", "physics"]', "7"), r"when\.topic is 7, expected a text"),
        (lambda text: text.replace('when = { topic = ["maths", "physics"] }', ""), "comes after 'maths'"),
        (lambda text: "\n".join(f"[[teacher]]\nname = 't{n}'" for n in range(33)), "at most 32"),
    ],
)
def test_a_wrong_job_file_is_refused_with_what_would_be_right(
    change: Callable[[str], str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_job_file(change(JOB), name="job.toml")


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read job file .*missing\.toml"):
        load_job_file(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        load_job_file(tmp_path / "latin.toml")


@settings(deadline=None)
@given(st.lists(TAGS, max_size=8))
def test_every_prompt_goes_to_the_first_rule_that_matches(tags: list[dict[str, str]]) -> None:
    table = RoutingTable((MATHS, CODE, REST))
    prompts = [prompt(str(number), **each) for number, each in enumerate(tags)]
    parts = {rule.teacher: list(PromptRoute(rule.teacher, table).apply(prompts)) for rule in table.rules}
    assert sorted(one.prompt_id for part in parts.values() for one in part) == sorted(
        one.prompt_id for one in prompts
    )
    for teacher, part in parts.items():
        rule = next(rule for rule in table.rules if rule.teacher == teacher)
        assert all(rule.matches(one.tags) and one.tags["teacher"] == teacher for one in part)
    assert all(one.tags["topic"] not in ("maths", "physics") for one in parts["rest"] if "topic" in one.tags)


@settings(deadline=None)
@given(st.lists(TAGS, max_size=8))
def test_with_all_every_teacher_that_matches_answers(tags: list[dict[str, str]]) -> None:
    table = RoutingTable((REST, MATHS), everyone=True)
    prompts = [prompt(str(number), **each) for number, each in enumerate(tags)]
    parts = [list(PromptRoute(rule.teacher, table, names_ids=True).apply(prompts)) for rule in table.rules]
    ids = [one.prompt_id for part in parts for one in part]
    assert len(set(ids)) == len(ids)
    assert [original_prompt_id(one.prompt_id, one.tags) for one in parts[0]] == [
        one.prompt_id for one in prompts
    ]
    assert len(parts[1]) == sum(MATHS.matches(each) for each in tags)


def test_an_id_without_room_for_its_teacher_is_refused() -> None:
    route = PromptRoute("maths", RoutingTable((MATHS,), everyone=True), names_ids=True)
    longest = "x" * (MAX_ID_BYTES - len("@maths"))
    assert route.prompt_id(longest) == f"{longest}@maths"
    with pytest.raises(ConfigError, match="takes 257 bytes with its teacher, at most 256"):
        route.prompt_id(f"{longest}x")
    assert replace(route, names_ids=False).prompt_id("x" * MAX_ID_BYTES) == "x" * MAX_ID_BYTES


def test_prompts_that_no_teacher_takes_are_refused() -> None:
    table = RoutingTable((MATHS, CODE))
    assert count_routes(table, [prompt(topic="maths")] * 3) == {"maths": 3}
    with pytest.raises(ConfigError, match=r"f\.jsonl:7: prompt 'b' \(topic=art\) .* 2 prompts in all"):
        count_routes(table, [prompt("a", topic="maths"), prompt("b", topic="art"), prompt("c")])


def job_configs(job: JobFile, *configs: TeachConfig) -> tuple[TeachConfig, ...]:
    return assign_teachers(job.table, configs)


def test_each_teacher_gets_its_part_and_a_producer_of_its_own() -> None:
    job = parse_job_file(JOB, name="job.toml")
    configs = [teach_config(Path(model), producer_id="site-7") for model in "ab"]
    maths, rest = job_configs(job, *configs)
    assert (maths.producer_id, rest.producer_id) == ("site-7-maths", "site-7-rest")
    assert maths.route is not None
    assert (maths.route.teacher, maths.route.names_ids) == ("maths", False)


def test_ids_name_the_teacher_only_where_several_answer_the_same_in_one_stream() -> None:
    job = parse_job_file("assign = 'all'\n" + JOB, name="job.toml")
    shared = job_configs(job, teach_config(Path("a")), teach_config(Path("b")))
    apart = job_configs(job, teach_config(Path("a")), teach_config(Path("b"), stream="other"))
    assert [config.route and config.route.names_ids for config in (*shared, *apart)] == [True] * 2 + [
        False
    ] * 2


def test_teachers_of_one_stream_encode_alike() -> None:
    job = parse_job_file(JOB, name="job.toml")
    one = teach_config(Path("a"))
    with pytest.raises(
        ConfigError, match="'maths' and 'rest' write to stream 'lessons', and their top_k is 16"
    ):
        job_configs(job, one, replace(one, top_k=8))
    job_configs(job, one, replace(one, top_k=8, stream="other"))


@pytest.mark.parametrize(
    ("licenses", "joined"),
    [
        (["MIT", "MIT"], "MIT"),
        (["Apache-2.0", "MIT", "Apache-2.0"], "Apache-2.0 AND MIT"),
        (["MIT OR BSD-3-Clause", "Apache-2.0"], "(MIT OR BSD-3-Clause) AND Apache-2.0"),
        (["MIT OR BSD-3-Clause"], "MIT OR BSD-3-Clause"),
    ],
)
def test_a_shared_stream_is_under_the_terms_of_all_its_teachers(licenses: list[str], joined: str) -> None:
    assert join_licenses(licenses) == joined


def test_a_later_teacher_takes_the_spec_of_the_stream_that_announces_it() -> None:
    labels = {"teacher.first": "first@1, MIT", "teacher.second": "second@2, MIT", "purpose": "tests"}
    existing = make_spec(labels=labels)
    own = make_spec(labels=labels, teacher=replace(existing.teacher, model="second", vocab_size=390))
    assert shared_spec(existing, own, "second") == existing
    assert shared_spec(existing, own, "third") == own
    wide = replace(own, teacher=replace(own.teacher, vocab_size=401))
    with pytest.raises(MisalignmentError, match="'second' are 401 wide, those of stream 'lessons' 400"):
        shared_spec(existing, wide, "second")
    assert set(teachers_of(existing.labels)) == {"first", "second"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer": {"vocab_sha256": bytes([1]) * 32}}, "vocabulary: teacher 'first' has 384 tokens"),
        ({"tokenizer": {"eos_token_ids": (2, 3)}}, r"end tokens: teacher \[2\], this one \[2, 3\]"),
        ({"teacher": {"logprobs_temperature": 2.0}}, r"logprobs_temperature: 1\.0, teacher 'second' 2\.0"),
    ],
)
def test_a_teacher_that_differs_where_it_must_not_is_refused(
    changes: dict[str, dict[str, Any]], complaint: str
) -> None:
    spec = make_spec()
    teacher = replace(spec.teacher, **changes.get("teacher", {}))
    tokenizer = replace(spec.tokenizer, **changes.get("tokenizer", {}))
    with pytest.raises(MisalignmentError, match=complaint) as caught:
        refuse_misaligned("lessons", "second", (spec.teacher, spec.tokenizer), (teacher, tokenizer))
    assert "{teacher} in the stream's name" in caught.value.remedy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two teachers with one tokenizer, and one with another."""
    root = tmp_path_factory.mktemp("models")
    return {
        "maths": build_tiny_llama(root / "maths", num_layers=1),
        "rest": build_tiny_llama(root / "rest", num_layers=1, seed=1),
        "other": build_tiny_llama(root / "other", num_layers=1, corpus=("other words",)),
    }


def write_prompts(path: Path) -> Path:
    lines = [
        {"id": f"p{n}", "prompt": f"{n}?", "tags": {"topic": "maths" if n % 2 else "art"}} for n in (1, 2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_shared_stream_names_its_teachers_and_all_terms(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    job = parse_job_file(JOB, name="job.toml")
    configs = job_configs(
        job,
        teach_config(models["maths"], prompts=prompts, labels={"purpose": "tests"}),
        teach_config(models["rest"], prompts=prompts, license="MIT"),
    )
    maths, rest = prepare_teachers(configs)
    assert maths.labels == rest.labels
    assert set(teachers_of(maths.labels)) == {"maths", "rest"}
    assert maths.labels["teacher.rest"].startswith("rest@sha256:")
    assert maths.labels["purpose"] == "tests"
    assert [config.route and config.route.vocab_size for config in (maths, rest)] == [384, 384]
    assert (maths.license, rest.license) == ("Apache-2.0 AND MIT",) * 2


def test_a_teacher_without_prompts_is_announced_and_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}')
    job = parse_job_file(JOB, name="job.toml")
    configs = [teach_config(models[name], prompts=prompts) for name in ("maths", "rest")]
    (rest,) = prepare_teachers(job_configs(job, *configs))
    assert rest.route is not None
    assert rest.route.teacher == "rest"
    assert set(teachers_of(rest.labels)) == {"maths", "rest"}


def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    models: dict[str, Path], tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    job = parse_job_file(JOB, name="job.toml")
    maths = teach_config(models["maths"], prompts=prompts)
    with pytest.raises(MisalignmentError, match="teacher 'rest' cannot write to stream 'lessons' of 'maths'"):
        prepare_teachers(job_configs(job, maths, teach_config(models["other"], prompts=prompts)))
    apart = job_configs(job, maths, teach_config(models["other"], prompts=prompts, stream="other"))
    assert [config.labels for config in prepare_teachers(apart)] == [{}, {}]
    with pytest.raises(ConfigError, match=r"the files of teacher .* are not here"):
        prepare_teachers(job_configs(job, maths, teach_config(tmp_path / "none", prompts=prompts)))
    with pytest.raises(ConfigError, match="matches no teacher's rule, 1 prompts in all"):
        prepare_teachers(assign_teachers(RoutingTable((MATHS,)), [maths]))


def test_an_unknown_teacher_is_refused() -> None:
    job = parse_job_file(JOB, name="job.toml")
    configs = job_configs(job, teach_config(Path("a")), teach_config(Path("b")))
    with pytest.raises(ConfigError, match=r"the job has no teacher 'art': name one of maths, rest"):
        run_several(configs, only="art")


class LateClient:
    """Of a stream that another teacher opens just after this one looked for it."""

    def __init__(self, existing: StreamSpec) -> None:
        self.existing = existing
        self.looked = 0

    def get_stream(self, name: str) -> SimpleNamespace:
        self.looked += 1
        if self.looked == 1:
            raise StreamNotFoundError(f"there is no stream {name!r}")
        return SimpleNamespace(spec=self.existing)

    def open_stream(self, spec: StreamSpec) -> None:
        if spec != self.existing:
            raise StreamExistsError(f"stream {spec.name!r} exists and is another")


def test_teachers_that_open_their_stream_at_the_same_time_share_it() -> None:
    labels = {"teacher.first": "first@1, MIT", "teacher.second": "second@2, MIT"}
    existing = make_spec(labels=labels)
    own = make_spec(labels=labels, teacher=replace(existing.teacher, model="second"))
    client: Any = LateClient(existing)
    assert (
        open_joined(
            client,
            own,
            PromptRoute(
                "second",
                RoutingTable((RouteRule("first"), RouteRule("second")), everyone=True),
                vocab_size=own.teacher.vocab_size,
            ),
        )
        == existing
    )
    client = LateClient(existing)
    with pytest.raises(StreamExistsError):
        open_joined(client, own, None)
