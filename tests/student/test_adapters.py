"""Low-rank adapters: trained, saved, resumed, shared and merged, with peft as the judge."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from peft import PeftModel
from student.run_material import Configure, configure_runs, digests, weights
from student.run_processes import run_ranks
from student.teaching_material import offer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.student.adapters import find_base
from lynearm.student.checkpoint import load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.lora_settings import LoraSettings, format_lora, parse_lora
from lynearm.student.merging import merge_student
from lynearm.student.model import StudentModel, load_student
from lynearm.student.trainer import run_train
from lynearm.wire.errors import CheckpointError, ConfigError, MissingDependencyError
from lynearm.wire.traces import Trace

INPUT_IDS = torch.tensor([[7, 30, 31, 200, 5, 77]])
LORA = "r=4,alpha=8"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def configure(
    service: ServiceProcess,
    teacher: StudentModel,
    student_dir: Path,
    traces: list[Trace],
    tmp_path_factory: pytest.TempPathFactory,
) -> Configure:
    offer(service.target, teacher, traces, name="adapting")
    return configure_runs(service, student_dir, "adapting", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def adapter_dir(configure: Configure) -> Path:
    """A checkpoint of a run of seven steps."""
    return run_train(configure("adapter", lora=LORA, max_steps=7, epochs=2)).checkpoint


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(INPUT_IDS, use_cache=False).logits
    return found


def test_only_the_adapter_is_trained_and_saved(
    configure: Configure, student_dir: Path, adapter_dir: Path
) -> None:
    names = {path.name for path in adapter_dir.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
    assert not names & {"config.json", "model.safetensors"}
    base, after = weights(student_dir), weights(adapter_dir)
    kept = {name.replace(".base_layer.", "."): value for name, value in after.items() if "lora" not in name}
    assert kept.keys() == base.keys()
    assert all(torch.equal(base[name], value) for name, value in kept.items())
    moments = load_checkpoint(adapter_dir).optimizer
    trained = {name for name in moments if not name.startswith("rng.")}
    assert len(trained) == 2 * 2 * len(LINEAR) * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    grown = [value for name, value in after.items() if "lora_B" in name]
    assert all(value.abs().max() > 0 for value in grown)


def test_an_adapter_takes_back_a_change_of_low_rank(
    configure: Configure, teacher_dir: Path, tmp_path: Path
) -> None:
    """The base is the teacher with a change of rank 1 in some of its matrices."""
    base = load_student(teacher_dir, device="cpu").model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in base.model.layers:
            for projection in (layer.self_attn.v_proj, layer.mlp.up_proj):
                rows, columns = projection.weight.shape
                change = torch.outer(
                    torch.randn(rows, generator=generator), torch.randn(columns, generator=generator)
                )
                projection.weight += 0.2 * change
    shutil.copytree(teacher_dir, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    report = run_train(configure("learns", student=tmp_path / "base", lora="default", epochs=3))
    assert report.held_out_before is not None
    assert report.held_out_after is not None
    assert report.held_out_after < 0.8 * report.held_out_before


def test_peft_and_transformers_load_it_by_themselves(student_dir: Path, adapter_dir: Path) -> None:
    ours = logits(load_student(adapter_dir, device="cpu").model.eval())
    base = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    assert not torch.equal(logits(base), ours)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter_dir).eval()), ours)
    # By the name of the base in it.
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter_dir, dtype=torch.float32)), ours)
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (student_dir, adapter_dir)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_an_adapter_on_a_base_with_a_relative_path_is_found_from_anywhere(
    student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(student_dir.parent)
    relative = Path(student_dir.name)
    student = load_student(relative, device="cpu", lora=parse_lora("r=4,alpha=8"))
    assert student.adapter is not None
    student.adapter.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_base(tmp_path) == student_dir.resolve()


def test_a_new_adapter_changes_nothing_and_is_the_same_in_every_process(student_dir: Path) -> None:
    settings = parse_lora(LORA)
    torch.manual_seed(1)
    first = load_student(student_dir, device="cpu", lora=settings, seed=3)
    after = torch.rand(3)
    torch.manual_seed(1)
    load_student(student_dir, device="cpu")
    assert torch.equal(after, torch.rand(3))  # no draw of the run's own generator
    second = load_student(student_dir, device="cpu", lora=settings, seed=3)
    other = load_student(student_dir, device="cpu", lora=settings, seed=4)
    assert torch.equal(logits(first.model), logits(load_student(student_dir, device="cpu").model))
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    drawn = [dict(each.named_parameters())[name] for each in (first, second, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_resumed_run_repeats_the_uninterrupted_one(configure: Configure, adapter_dir: Path) -> None:
    for number, steps in enumerate((2, 5, 7)):
        part = run_train(configure("parts", lora=LORA, epochs=2, max_steps=steps, resume=number > 0))
    ours, theirs = (each / "adapter_model.safetensors" for each in (part.checkpoint, adapter_dir))
    assert ours.read_bytes() == theirs.read_bytes()
    configs = [(each / "adapter_config.json").read_bytes() for each in (part.checkpoint, adapter_dir)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("lora", ["", "r=8,alpha=8"])
def test_a_run_goes_on_only_with_its_own_adapter(configure: Configure, adapter_dir: Path, lora: str) -> None:
    with pytest.raises(ConfigError, match="lora was r=4,alpha=8 and is"):
        run_train(configure("adapter", lora=lora, epochs=2, resume=True))


def test_dropout_and_checkpointed_gradients_resume_too(configure: Configure) -> None:
    form = {"lora": "r=2,dropout=0.2,targets=q_proj+v_proj", "gradient_checkpointing": True}
    whole = run_train(configure("dropping", max_steps=4, **form))
    run_train(configure("dropping parts", max_steps=2, **form))
    parts = run_train(configure("dropping parts", max_steps=4, resume=True, **form))
    ours, theirs = (each.checkpoint / "adapter_model.safetensors" for each in (parts, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_checkpoints_beside_the_training_are_those_of_their_step(configure: Configure) -> None:
    overrides = {"lora": LORA, "max_steps": 4, "checkpoint_every_steps": 2, "keep_checkpoints": 9}
    for name, beside in (("beside", True), ("between", False)):
        run_train(configure(name, async_checkpoints=beside, **overrides))
    for step in ("step-00000002", "step-00000004"):
        files = [configure(name).out / step / "adapter_model.safetensors" for name in ("beside", "between")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_command_takes_every_form(configure: Configure, student_dir: Path) -> None:
    config = configure("by command")
    arguments = ["--student", str(student_dir), "--stream", config.streams[0], "--service", config.service]
    arguments += ["--out", str(config.out), "--max-steps", "1", "--held-out-traces", "0", "--device", "cpu"]
    arguments += [
        "--lora",
        LORA,
        "--freeze",
        "layers.0,norms",
        "--freeze",
        "head",
        "--gradient-checkpointing",
    ]
    done = CliRunner().invoke(app, ["train", *arguments, "--progress", "none"])
    assert done.exit_code == 0, done.output
    written = load_checkpoint(config.out / "step-00000001").written_by
    assert (written["lora"], written["freeze"]) == (LORA, ["layers.0,norms", "head"])
    assert written["gradient_checkpointing"] is True


def test_specialists_share_a_base_that_nobody_writes(configure: Configure, student_dir: Path) -> None:
    before = digests(student_dir)
    reports = [run_train(configure(f"one of {seed}", lora=LORA, max_steps=2, seed=seed)) for seed in (1, 2)]
    assert digests(student_dir) == before
    base = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    both = PeftModel.from_pretrained(base, reports[0].checkpoint, adapter_name="first").eval()
    both.load_adapter(reports[1].checkpoint, adapter_name="second")
    for name, report in zip(("first", "second"), reports, strict=True):
        both.set_adapter(name)
        expected = logits(load_student(report.checkpoint, device="cpu").model.eval())
        torch.testing.assert_close(logits(both), expected, rtol=0, atol=0)


def test_parts_of_an_adapter_can_be_frozen(configure: Configure) -> None:
    report = run_train(configure("frozen", lora=LORA, freeze=("layers.0", "embeddings"), max_steps=2))
    found = weights(report.checkpoint)
    moved = {name for name, value in found.items() if "lora_B" in name and value.abs().max() > 0}
    assert moved
    assert all(".layers.1." in name for name in moved)


def test_an_adapter_can_be_trained_further(configure: Configure, adapter_dir: Path) -> None:
    report = run_train(configure("further", student=adapter_dir, max_steps=1))
    lineage = json.loads((report.checkpoint / "lynearm.json").read_text())
    assert lineage["adapter"]["r"] == 4
    assert len(lineage["streams"]) == 2
    with pytest.raises(ConfigError, match="is an adapter already"):
        run_train(configure("twice", student=adapter_dir, lora=LORA))


def test_the_manifest_and_the_card_name_adapter_and_base(adapter_dir: Path, student_dir: Path) -> None:
    lineage = json.loads((adapter_dir / "lynearm.json").read_text())
    adapter, run = lineage["adapter"], lineage["runs"][0]
    assert (adapter["kind"], adapter["r"], adapter["alpha"]) == ("lora", 4, 8.0)
    assert adapter["targets"] == sorted(LINEAR)
    assert adapter["base"]["name"] == student_dir.name
    assert adapter["base"]["revision"].startswith("sha256:")
    assert run["settings"]["lora"] == LORA
    assert run["code"]["peft"] != "unknown"
    assert str(adapter_dir.parent.parent) not in json.dumps(lineage)
    card = (adapter_dir / "README.md").read_text()
    assert 'library_name: "peft"' in card
    assert 'base_model: ["student"]\nbase_model_relation: "adapter"' in card
    assert "It is a LoRA adapter (r=4, alpha=8.0) on `student` at `sha256:" in card


def test_a_merged_adapter_is_a_plain_model(tmp_path: Path, adapter_dir: Path) -> None:
    made = CliRunner().invoke(
        app, ["student", "merge", str(adapter_dir.parent), "--out", str(tmp_path / "merged")]
    )
    assert made.exit_code == 0, made.output
    merged = load_student(tmp_path / "merged", device="cpu")
    assert merged.adapter is None
    torch.testing.assert_close(
        logits(merged.model),
        logits(load_student(adapter_dir, device="cpu").model.eval()),
        rtol=1e-5,
        atol=1e-4,
    )
    assert merged.model.lm_head.weight is merged.model.model.embed_tokens.weight
    manifest = json.loads((tmp_path / "merged" / "lynearm.json").read_text())
    assert manifest["adapter"]["merged"] is True
    assert 'library_name: "transformers"' in (tmp_path / "merged" / "README.md").read_text()
    assert (tmp_path / "merged" / "held_out.block").is_file()
    with pytest.raises(CheckpointError, match="in use"):
        merge_student(adapter_dir, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is no adapter"):
        merge_student(tmp_path / "merged", tmp_path / "again")


def test_ranks_train_one_adapter(configure: Configure) -> None:
    alone, shared = (configure(name, lora=LORA, max_steps=3) for name in ("alone", "shared"))
    run_train(alone)
    run_ranks(shared, 2)
    ours, theirs = (weights(config.out / "step-00000003") for config in (shared, alone))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_a_base_that_has_changed_or_gone_is_refused(
    tmp_path: Path, configure: Configure, student_dir: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(student_dir, base)
    report = run_train(configure("moving", student=base, lora=LORA, max_steps=1))
    model = load_student(base, device="cpu").model
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(base)
    with pytest.raises(CheckpointError, match="was trained on a base at sha256:"):
        load_student(report.checkpoint, device="cpu")
    os.rename(base, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not a model here") as caught:
        load_student(report.checkpoint, device="cpu")
    assert "base_model_name_or_path" in caught.value.remedy


def test_a_damaged_adapter_is_refused(tmp_path: Path, adapter_dir: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_dir, broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    for change, said in (({"r": 8}, "does not fit"), ({"target_modules": ["nothing"]}, "does not fit")):
        (broken / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=said):
            load_student(broken, device="cpu")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="no adapter that can be read"):
        load_student(broken, device="cpu")
    (broken / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_student(broken, device="cpu")


def test_targets_that_the_student_has_not_are_refused(student_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter fits student"):
        load_student(student_dir, device="cpu", lora=LoraSettings(targets=("c_attn",)))


def test_without_peft_the_remedy_is_said(student_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="adapters need peft") as caught:
        load_student(student_dir, device="cpu", lora=LoraSettings())
    assert "lynearm[lora]" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank=4", "'rank=4' is none of r, alpha, dropout, targets"),
        ("r", "'r' is none of"),
        ("r=4,r=8", "is none of"),
        ("r=four", "r is 'four', expected a number"),
        ("r=0", "expected r from 1"),
        ("alpha=-1", "alpha above 0"),
        ("alpha=nan", "alpha above 0"),
        ("dropout=1", "below 1"),
        ("targets=", "expected r from 1"),
        ("targets=q_proj+lm_head", "targets lm_head, which adapters leave as it is"),
        ("targets=embed_tokens", "targets embed_tokens"),
        ("targets=all-linear+q_proj", "all-linear has them all already"),
    ],
)
def test_a_slip_of_the_pen_is_said_before_anything_is_loaded(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(lora=text)
    assert said in str(caught.value)


@pytest.mark.parametrize("other", [{"sharding": "full"}, {"on_policy": True}])
def test_an_adapter_is_neither_sharded_nor_asked_for_rollouts(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="lora does not go with"):
        TrainConfig(lora=LORA, **other)  # type: ignore[arg-type]  # fields by name


def test_settings_are_written_as_they_are_read() -> None:
    for text in ("default", "r=8", "alpha=1.5,dropout=0.1", "r=4,targets=q_proj+v_proj"):
        assert parse_lora(format_lora(parse_lora(text))) == parse_lora(text)
    assert parse_lora("default") == LoraSettings()
