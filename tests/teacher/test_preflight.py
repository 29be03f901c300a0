"""What is refused before anything starts: models that do not fit, prompts and settings that cannot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models.teaching import teach_config
from models.tiny_llama import write_tokenizer

from lynearm.teacher import memory, preflight
from lynearm.teacher.chat_template import ChatTemplate
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.memory import MemoryNeed, check_fits, estimate_memory, free_memory
from lynearm.teacher.preflight import load_checker, runs_here
from lynearm.teacher.prompt_sources import UsablePrompts
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.teacher.tokenizer import PromptTokenizer
from lynearm.wire.errors import CheckpointError, ConfigError, PromptFileError, PromptTooLongError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

THINKING_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if SWITCH is defined and not SWITCH %}<think>\n\n</think>\n\n{% endif %}"
    "{% if effort is defined %}({{ effort }}){% endif %}"
)


def load_tokenizer(directory: Path, template: str | None) -> Any:
    from transformers import AutoTokenizer

    directory.mkdir()
    write_tokenizer(directory, vocab_size=384, chat_template=template)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module", params=["enable_thinking", "thinking"])
def thinker(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    template = THINKING_TEMPLATE.replace("SWITCH", request.param)
    return load_tokenizer(tmp_path_factory.mktemp("thinker") / "tokenizer", template)


def text_of(tokenizer: Any, prompt: Prompt, **settings: Any) -> str:
    config = teach_config(Path("m"), **settings)
    ids = PromptTokenizer(tokenizer, config, max_model_len=128).encode(prompt)
    return str(tokenizer.decode(ids))


def test_thinking_is_switched_by_whatever_name_the_template_has_for_it(thinker: Any) -> None:
    prompt = Prompt("a", "Hi")
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(thinker, prompt) == text_of(thinker, prompt, thinking=True) == start
    assert text_of(thinker, prompt, thinking=False) == start + "<think>\n\n</think>\n\n"
    assert text_of(thinker, prompt, template_args={"effort": "high"}) == start + "(high)"


def test_a_switch_that_the_template_does_not_have_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = teach_config(tiny_model, thinking=False)
    with pytest.raises(
        ConfigError, match="no switch for thinking: it reads neither enable_thinking nor thinking"
    ):
        ChatTemplate(AutoTokenizer.from_pretrained(tiny_model), config)
    without = load_tokenizer(tmp_path / "plain", None)
    with pytest.raises(ConfigError, match="no switch for thinking"):
        ChatTemplate(without, config)
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTemplate(without, teach_config(tiny_model, template_args={"effort": "high"}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chat": False, "system": "Be brief."}, "exclude chat = false"),
        ({"chat": False, "thinking": True}, "exclude chat = false"),
        ({"template_args": {"tokenize": True}}, "template_args may not hold"),
        ({"temperature": 0.0, "completions": 2}, "2 completions at temperature 0 are all the same"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"sample_top_k": -1}, "sample_top_k -1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        teach_config(Path("m"), **settings)


def test_token_ids_go_into_the_model_as_they_are(engine: TeacherEngine) -> None:
    assert engine.tokenizer.encode(Prompt("a", token_ids=(5, 383, 5))).tolist() == [5, 383, 5]
    with pytest.raises(ConfigError, match="token id 384 is outside the teacher's vocabulary, 0 to 383"):
        engine.tokenizer.encode(Prompt("a", token_ids=(5, 384)))
    with pytest.raises(PromptTooLongError, match="128 tokens"):
        engine.tokenizer.encode(Prompt("a", token_ids=(5,) * 128))


def test_sampling_filters_are_recorded_and_obeyed(
    engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_config", replace(engine._config, sample_top_k=1, min_p=0.5, top_p=0.9))
    sampling = engine.sampling("a", 0, 3)
    assert (sampling.top_k, sampling.min_p, sampling.top_p) == (1, 0.5, 0.9)
    for index in range(4):
        engine.add(f"{index}", [5, 6, 7], replace(sampling, seed=index, max_tokens=8))
    done: list[list[int]] = []
    while engine.unfinished:
        done += [completion.token_ids.tolist() for completion in engine.step()]
    assert len(done) == 4
    assert all(one == done[0] for one in done), "of one likeliest token, any seed draws the same"


def test_prompts_that_the_teacher_cannot_take_never_enter_the_job(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "thinker"
    load_tokenizer(model, THINKING_TEMPLATE)
    (model / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    late = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}]
    lines = [
        {"prompt": "fine"},
        {"prompt_token_ids": [1, 2, 384]},
        {"messages": late},
        {"prompt_token_ids": [1] * 200},
        {"prompt_token_ids": [1, 2, 383]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    prompts = UsablePrompts(teach_config(model, prompts=str(path)))
    assert [one.line for one in prompts] == [1, 5]
    reasons = [line.reason for line in prompts.bad_lines]
    assert reasons[0] == "token id 384 is outside the teacher's vocabulary, 0 to 383"
    assert reasons[1].startswith(
        "the chat template refuses the messages (user, system): system must come first"
    )
    assert reasons[2].startswith("the prompt is 200 tokens")
    with pytest.raises(PromptFileError, match=r"p\.jsonl:2: token id 384"):
        list(UsablePrompts(teach_config(model, prompts=str(path), strict=True)))
    with pytest.raises(ConfigError, match="reasoning marker"):
        list(UsablePrompts(teach_config(model, prompts=str(path), reasoning_start="<reason>")))


def test_a_template_is_tried_once_for_each_sequence_of_roles(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = load_checker(teach_config(tiny_model))
    assert checker is not None
    rendered: list[int] = []
    render = ChatTemplate.render

    def count(self: ChatTemplate, messages: Any, **more: object) -> str:
        rendered.append(len(messages))
        return render(self, messages, **more)

    monkeypatch.setattr(ChatTemplate, "render", count)
    for n in range(100):
        assert not checker.problem(Prompt(f"{n}", f"What is {n}?"))
        assert not checker.problem(Prompt(f"{n}", messages=(ChatMessage("user", f"What is {n}?"),)))
    assert len(rendered) == 2


def test_where_the_model_is_not_here_nothing_is_checked(tmp_path: Path) -> None:
    assert load_checker(teach_config(tmp_path / "elsewhere")) is None


def test_memory_is_weights_one_sequence_and_logits(tiny_model: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "np") as file:
        parameters = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118  # no mapping
    need = estimate_memory(tiny_model, teach_config(tiny_model), on_cpu=True)
    assert need == MemoryNeed(
        weights_bytes=4 * parameters,
        token_bytes=2 * 2 * 1 * 32 * 4,  # keys and values, layers, heads, width, float32
        max_model_len=128,
        logits_bytes=4 * 40 * 384,
    )
    halved = estimate_memory(tiny_model, teach_config(tiny_model, dtype="bfloat16"), on_cpu=True)
    assert 2 * halved.weights_bytes == need.weights_bytes
    assert 2 * halved.token_bytes == need.token_bytes
    assert estimate_memory(tiny_model, teach_config(tiny_model), on_cpu=False) == halved
    longer = teach_config(tiny_model, max_model_len=4096, max_tokens=8)
    assert estimate_memory(tiny_model, longer, on_cpu=True).max_model_len == 512, "the model's own bound"


def test_quantised_weights_stay_as_they_are_stored(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    weights = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    need = estimate_memory(tmp_path, teach_config(tmp_path, dtype="bfloat16"), on_cpu=True)
    assert need.weights_bytes == len(weights)


def test_a_model_that_does_not_fit_is_refused_with_both_figures(tiny_model: Path) -> None:
    config = teach_config(tiny_model)
    need = MemoryNeed(30 << 30, 1 << 20, 2048, 1 << 20)
    with pytest.raises(ConfigError) as refused:
        check_fits(need, 11 << 30, config)
    assert str(refused.value) == (
        f"teacher '{tiny_model}' needs 32.00 GiB (30.00 GiB of weights, 2.00 GiB for one sequence of 2048 "
        "tokens), and 11.00 GiB are free: free some, lower --max-model-len, set --dtype bfloat16, or take a "
        "smaller model"
    )
    check_fits(need, 33 << 30, config)
    with pytest.raises(ConfigError, match="kv_cache_mib 100 is below the 2048 MiB of one sequence"):
        check_fits(need, 33 << 30, teach_config(tiny_model, kv_cache_mib=100))


def test_a_job_on_this_machine_is_refused_before_ray_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 1000)
    monkeypatch.setattr(preflight, "_GPU_DEVICE", tmp_path / "none")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"needs 0\.00 GiB"):
        load_checker(teach_config(tiny_model))
    # On a cluster, the machines of the workers count.
    assert load_checker(teach_config(tiny_model, ray_address="auto")) is not None


def test_an_engine_is_refused_before_it_loads(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lynearm.teacher import engine_start

    monkeypatch.setattr(engine_start, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^teacher '.*' needs 0\.00 GiB .*of weights"):
        TeacherEngine(teach_config(tiny_model))


@pytest.mark.parametrize(
    ("address", "variable", "expected"),
    [("", "", True), ("local", "", True), ("local", "h:1", True), ("", "h:1", False), ("auto", "", False)],
)
def test_a_job_runs_here_unless_ray_is_elsewhere(
    address: str, variable: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert runs_here(teach_config(Path("m"), ray_address=address)) is expected


def test_free_memory_is_what_the_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory() == 3000 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 3000 << 10
    (tmp_path / "memory.max").write_text(f"{2000 << 10}\n")
    (tmp_path / "memory.current").write_text(f"{1500 << 10}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {500 << 10}\n")
    assert free_memory() == 1000 << 10


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "is no model in the transformers layout"),
        ("config.json", b"[]", "is no JSON object"),
        ("model.safetensors", b"\xff" * 16, "is no safetensors file"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "is no safetensors file"),
        ("model.safetensors", (9).to_bytes(8, "little") + b'{"a": {}}', "is no safetensors file"),
    ],
)
def test_a_damaged_model_is_named(
    name: str, content: bytes, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        estimate_memory(tmp_path, TeachConfig("m", "p", "s"), on_cpu=True)
