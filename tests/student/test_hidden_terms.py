"""Hidden states in the loss: which layers are compared, exact gradients, resumption, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models.service_process import ServiceProcess
from models.tiny_llama import build_tiny_llama
from student.run_material import short_run
from student.run_processes import join, run_ranks, start_run
from student.teaching_material import make_spec

from lynearm.client import TraceClient
from lynearm.student.batches import Batch, PieceSizes, collate
from lynearm.student.checkpoint import OPTIMIZER_FILE, latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.layer_pairs import LayerPair, pair_by_depth
from lynearm.student.metrics import metric_values, read_metrics
from lynearm.student.model import StudentModel, load_student
from lynearm.student.objective import HIDDEN_LOSS_NAMES, LossTerm, make_objective, parse_term
from lynearm.student.optimization import Optimization
from lynearm.student.teacher_states import WantedStates
from lynearm.student.trainer import run_train
from lynearm.student.weighting import PositionWeighting
from lynearm.wire.codec import encode_block
from lynearm.wire.errors import CheckpointError, ConfigError, MisalignmentError
from lynearm.wire.hidden import FINAL_NORM, HiddenDtype, HiddenStates, HiddenStatesSpec, Layer
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Trace

CARRIED: tuple[Layer, ...] = (0, 1, FINAL_NORM)
LOSS = ("forward-kl", "hidden-cosine@0=0,2=1:0.5", "hidden-mse@1=0,norm=norm:0.25")

numbers = itertools.count()


def carry_states(teacher: StudentModel, trace: Trace, dtype: HiddenDtype = "bf16") -> Trace:
    """The trace with the states that transformers returns for `CARRIED`."""
    token_ids = torch.tensor([[*trace.prompt_token_ids.tolist(), *trace.completion_token_ids.tolist()]])
    residual: list[torch.Tensor] = []
    # What goes into the final norm is the residual stream behind the last layer.
    hook = teacher.model.model.norm.register_forward_pre_hook(lambda _, inputs: residual.append(inputs[0]))
    with torch.no_grad():
        states = teacher.model(input_ids=token_ids, output_hidden_states=True).hidden_states
    hook.remove()
    rows = slice(len(trace.prompt_token_ids) - 1, -1)
    states_LTH = torch.stack([states[1][0, rows], residual[0][0, rows], states[2][0, rows]]).numpy()
    return replace(trace, hidden=HiddenStates.from_float32(states_LTH, CARRIED, dtype))


@pytest.fixture(scope="module")
def deep_traces(teacher: StudentModel, traces: list[Trace]) -> list[Trace]:
    return [carry_states(teacher, trace) for trace in traces]


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of another depth and width than its teacher."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "wide", seed=3, num_layers=3, hidden_size=128)


def deep_spec(teacher: StudentModel, name: str = "deep", layers: tuple[Layer, ...] = CARRIED) -> StreamSpec:
    spec = make_spec(teacher, name)
    hidden = HiddenStatesSpec(layers, "bf16", teacher.hidden_size)
    return replace(spec, codec=replace(spec.codec, hidden=hidden))


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("hidden-cosine", LossTerm("hidden-cosine")),
        ("hidden-mse@4=4,8=8:0.5", LossTerm("hidden-mse", 0.5, pairs=((4, 4), (8, 8)))),
        ("hidden-cosine@ 2=29, norm=norm", LossTerm("hidden-cosine", pairs=((2, 29), ("norm", "norm")))),
    ],
)
def test_pairs_of_layers_are_read_and_written(text: str, term: LossTerm) -> None:
    assert parse_term(text) == term
    assert parse_term(str(term)) == term


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hidden-cosine@0.5", "'0.5' is no pair"),
        ("hidden-cosine@4=4,", "'' is no pair"),
        ("hidden-cosine@-1=-1", "'-1' is no layer"),
        ("hidden-mse@4=5=6", "'5=6' is no layer"),
        ("hidden-mse@4=70000", "'70000' is no layer"),
        ("hidden-mse@4=4,4=4", "each pair once"),
        ("forward-kl@4=4", "'4=4' is not a number"),
    ],
)
def test_what_is_no_pair_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(loss=(text,))
    with pytest.raises(ConfigError, match="only for hidden-cosine and hidden-mse"):
        LossTerm("forward-kl", pairs=((4, 4),))


@pytest.mark.parametrize(
    ("carried", "student_layers", "pairs"),
    [
        ((9, 19, 29), 30, [(9, 9), (19, 19), (29, 29)]),
        ((9, 19, 29), 10, [(2, 9), (6, 19), (9, 29)]),
        ((0, 29, "norm"), 2, [(0, 0), (1, 29), ("norm", "norm")]),
        (("norm",), 5, [("norm", "norm")]),
        ((1,), 4, [(3, 1)]),
    ],
)
def test_layers_are_paired_by_their_depth(
    carried: tuple[Layer, ...], student_layers: int, pairs: list[LayerPair]
) -> None:
    assert list(pair_by_depth(carried, student_layers)) == pairs


def test_what_cannot_be_compared_is_refused_before_the_first_step(teacher: StudentModel) -> None:
    spec = deep_spec(teacher)
    (term,) = make_objective(spec, ["hidden-cosine"], student_layers=4).hidden_terms
    assert term.pairs == ((1, 0), (3, 1), ("norm", "norm"))
    for name in HIDDEN_LOSS_NAMES:
        with pytest.raises(MisalignmentError, match=f"{name} .* 'lessons' carries none") as refused:
            make_objective(make_spec(teacher), ["forward-kl", name], student_layers=4)
        assert "--capture" in refused.value.remedy
    with pytest.raises(MisalignmentError, match=r"layer 7, and stream 'deep' carries 0, 1, norm"):
        make_objective(spec, ["hidden-mse@0=7"], student_layers=4)
    with pytest.raises(ConfigError, match=r"student's layer 4, and the student has layers 0 to 3"):
        make_objective(spec, ["hidden-mse@4=1"], student_layers=4)
    with pytest.raises(ConfigError, match="does not say which its decoder layers are"):
        make_objective(spec, ["hidden-mse"], student_layers=0)
    make_objective(spec, ["hidden-mse@norm=norm"], student_layers=0)
    with pytest.raises(ConfigError, match="not settled"):
        Optimization(teacher, TrainConfig(loss=("hidden-cosine",)))


def test_states_are_those_behind_the_layers(wide_dir: Path) -> None:
    student = load_student(wide_dir, device="cpu")
    input_ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        last, states = student.layer_states(input_ids, None, (0, 1, 2, FINAL_NORM))
        assert not any(layer._forward_hooks for layer in student.decoder_layers)
        wanted = student.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        assert torch.equal(last, student.hidden_states(input_ids))
        # transformers' last one has been through the final norm.
        assert torch.equal(student.model.model.norm(states[2]), wanted[3])
    assert torch.equal(states[0], wanted[1])
    assert torch.equal(states[1], wanted[2])
    assert torch.equal(states[3], wanted[3])


def dense_gradients(
    student: StudentModel,
    traces: Sequence[Trace],
    terms: Sequence[LossTerm],
    projections: dict[str, torch.Tensor],
    weighting: PositionWeighting,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the whole batch by autograd, from formulas, a trace at a time."""
    weights_N = torch.cat([torch.from_numpy(weighting.weigh(trace)).double() for trace in traces])
    ours: dict[Layer, list[torch.Tensor]] = {}
    theirs: dict[Layer, list[torch.Tensor]] = {}
    cross_entropy: list[torch.Tensor] = []
    for trace in traces:
        assert trace.hidden is not None
        token_ids = torch.tensor([[*trace.prompt_token_ids.tolist(), *trace.completion_token_ids.tolist()]])
        residual: list[torch.Tensor] = []
        hook = student.model.model.norm.register_forward_pre_hook(
            lambda _, inputs, residual=residual: residual.append(inputs[0])
        )
        output = student.model(input_ids=token_ids, output_hidden_states=True)
        hook.remove()
        rows = slice(len(trace.prompt_token_ids) - 1, -1)
        found = dict(enumerate(output.hidden_states[1:-1])) | {
            2: residual[0],
            "norm": output.hidden_states[-1],
        }
        for layer, states in found.items():
            ours.setdefault(layer, []).append(states[0, rows])
        for layer, states_TH in zip(trace.hidden.layers, trace.hidden.to_float32(), strict=True):
            theirs.setdefault(layer, []).append(torch.from_numpy(states_TH).double())
        labels = torch.from_numpy(trace.completion_token_ids).long()
        cross_entropy.append(
            torch.nn.functional.cross_entropy(output.logits[0, rows], labels, reduction="none")
        )
    loss = torch.zeros((), dtype=torch.float64)
    for term in terms:
        values_N = torch.zeros_like(weights_N)
        for student_layer, teacher_layer in term.pairs:
            projection = projections[f"{term.name}.{student_layer}={teacher_layer}"]
            projected_NH = torch.cat(ours[student_layer]) @ projection.T
            target_NH = torch.cat(theirs[teacher_layer])
            if term.name == "hidden-cosine":
                lengths_N = projected_NH.norm(dim=1) * target_NH.norm(dim=1)
                part_N = 1 - (projected_NH * target_NH).sum(1) / lengths_N
            else:
                power = (weights_N * target_NH.square().mean(1)).sum() / weights_N.sum()
                part_N = (projected_NH - target_NH).square().mean(1) / power
            values_N = values_N + part_N / len(term.pairs)
        if term.name == "cross-entropy":
            values_N = torch.cat(cross_entropy)
        loss = loss + term.weight * (weights_N * values_N).sum() / weights_N.sum()
    named = dict(student.named_parameters()) | projections
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return float(loss.detach()), {
        name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None
    }


@pytest.mark.parametrize("losses", [("cross-entropy:0.3", *LOSS[1:]), LOSS[1:2], LOSS[2:]])
@pytest.mark.parametrize(("packing", "tokens"), [("off", 1), ("off", 4096), ("on", 40)])
def test_a_step_has_the_gradients_of_the_dense_reference(
    teacher: StudentModel,
    wide_dir: Path,
    deep_traces: list[Trace],
    losses: tuple[str, ...],
    packing: str,
    tokens: int,
) -> None:
    student = load_student(wide_dir, device="cpu")
    student.model.double()
    objective = make_objective(deep_spec(teacher), losses, student_layers=3)
    config = TrainConfig(
        wide_dir,
        loss=losses,
        packing=packing,
        micro_batch_tokens=tokens,
        grad_clip=0.0,
        tag_weights={"n=1": 0.25, "n=3": 3.0, "n=4": 0.0},
    )
    chosen = [replace(trace, tags={"n": str(number)}) for number, trace in enumerate(deep_traces[10:17])]
    # One as fp8.
    chosen[2] = replace(carry_states(teacher, deep_traces[12], "fp8"), tags={"n": "2"})
    optimization = Optimization(student, config, objectives=[objective])
    projections: dict[str, torch.Tensor] = dict(optimization._hidden.parameters())
    assert len(projections) == 2 * len(objective.hidden_terms)
    found: dict[str, torch.Tensor] = {}
    wanted_loss, wanted = dense_gradients(
        student, chosen, objective.terms, projections, PositionWeighting({}, config.tag_weights)
    )

    def keep(*_: Any) -> None:
        for name, parameter in optimization._parameters.items():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    optimization._optimizer.register_step_pre_hook(keep)
    result = optimization.step(Batch(tuple(chosen)), 1)
    assert result.loss == pytest.approx(wanted_loss, rel=1e-9)
    assert result.hidden is not None
    assert 0 < result.hidden <= result.loss + 1e-12
    assert wanted.keys() <= found.keys()
    for name, gradient in found.items():
        expected = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            gradient, expected, rtol=1e-7, atol=1e-10, msg=lambda said, n=name: n + said
        )


@pytest.mark.parametrize("overrides", [{"dtype": "bfloat16"}, {"freeze_embeddings": True}])
def test_half_precision_and_a_frozen_head_change_little(
    teacher: StudentModel, wide_dir: Path, deep_traces: list[Trace], overrides: dict[str, object]
) -> None:
    objective = make_objective(deep_spec(teacher), LOSS, student_layers=3)
    hidden: list[float] = []
    for config in (TrainConfig(wide_dir), replace(TrainConfig(wide_dir), **overrides)):  # type: ignore[arg-type]  # fields by name
        student = load_student(wide_dir, device="cpu", dtype=config.dtype)
        if config.freeze_embeddings:
            student.freeze_embeddings()
        optimization = Optimization(student, config, objectives=[objective])
        results = [optimization.step(Batch(tuple(deep_traces[8:12])), step) for step in (1, 2)]
        hidden += [result.hidden or 0.0 for result in results]
    assert hidden[2:] == pytest.approx(hidden[:2], rel=2e-2)


def test_states_are_cut_with_their_completion(deep_traces: list[Trace]) -> None:
    trace = max(deep_traces, key=lambda trace: len(trace.completion_token_ids))
    assert trace.hidden is not None
    wanted = WantedStates((1, FINAL_NORM), trace.hidden.hidden_size)
    sizes = PieceSizes(64, len(trace.prompt_token_ids) + 3)
    (piece,) = collate([trace], sizes, vocab_size=384, states=wanted)
    assert piece.states_NSH is not None
    assert piece.targets.sampled_ids_N.tolist() == trace.completion_token_ids[:3].tolist()
    assert torch.equal(piece.states_NSH, torch.from_numpy(trace.hidden.to_float32()[1:, :3].swapaxes(0, 1)))
    with pytest.raises(MisalignmentError, match=r"8 wide.*carries those of layers .* 64 wide"):
        collate([trace], sizes, vocab_size=384, states=replace(wanted, hidden_size=8))


def offer_deep(target: str, teacher: StudentModel, traces: Sequence[Trace], name: str) -> None:
    """Create a stream that promises states, publish the traces, seven a block, and seal it."""
    spec = deep_spec(teacher, name)
    with TraceClient(target) as client:
        client.create_stream(spec)
        with client.publisher(name, "teacher") as publisher:
            for start in range(0, len(traces), 7):
                part = traces[start : start + 7]
                publisher.publish(encode_block(part, codec="exact", vocab_size=teacher.vocab_size))
        client.seal_stream(name)


@pytest.fixture
def configure(
    service: ServiceProcess, teacher: StudentModel, deep_traces: list[Trace], wide_dir: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    stream = f"deep-{next(numbers)}"
    offer_deep(service.target, teacher, deep_traces, stream)

    def make(out: str, **overrides: object) -> TrainConfig:
        own: dict[str, object] = {"loss": LOSS}
        return short_run(service, wide_dir, (stream,), tmp_path / out, **(own | overrides))

    return make


def optimizer_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    directory = latest_checkpoint(config.out)
    assert directory is not None
    loader: Any = safetensors.torch  # half typed
    return dict(loader.load_file(directory / OPTIMIZER_FILE))


def test_a_resumed_run_goes_on_with_its_projections(configure: Callable[..., TrainConfig]) -> None:
    whole, parts = configure("whole"), configure("parts")
    report = run_train(whole)
    for number, steps in enumerate((5, 9)):
        run_train(replace(parts, max_steps=steps, resume=number > 0))
    resumed = run_train(replace(parts, resume=True))
    assert [record.loss for record in resumed.curve] == [record.loss for record in report.curve]
    ours, theirs = optimizer_of(parts), optimizer_of(whole)
    assert ours.keys() == theirs.keys()
    assert sum(name.startswith("projection.") for name in ours) == 4
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    models = [
        dict(load_student(run.checkpoint, device="cpu").named_parameters()) for run in (report, resumed)
    ]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    # It learns, it says so, and none of it is in the model.
    hidden = [record.hidden or 0.0 for record in report.curve]
    assert sum(hidden[-3:]) < 0.9 * sum(hidden[:3])
    assert read_metrics(whole.out).steps == report.curve
    assert metric_values(report.curve[0])["train/hidden"] == hidden[0]
    loader: Any = safetensors.torch  # half typed
    assert not [
        name
        for name in loader.load_file(report.checkpoint / "model.safetensors")
        if "projection" in name or "hidden" in name
    ]
    assert all(trace.hidden is None for trace in load_checkpoint(report.checkpoint).held_out)


def test_projections_are_drawn_once_and_the_same_on_every_rank(
    teacher: StudentModel, student_dir: Path, wide_dir: Path
) -> None:
    wide, narrow = load_student(wide_dir, device="cpu"), load_student(student_dir, device="cpu")
    objective = make_objective(deep_spec(teacher), ["hidden-cosine@1=1"], student_layers=2)

    def begin(student: StudentModel, seed: int) -> Optimization:
        torch.manual_seed(torch.seed())  # ranks do not share it
        return Optimization(student, TrainConfig(seed=seed), objectives=[objective])

    name = "projection.hidden-cosine.1=1"
    first, again, other = (begin(wide, seed) for seed in (1, 1, 2))
    assert torch.equal(first.state()[name], again.state()[name])
    assert not torch.equal(first.state()[name], other.state()[name])
    # A checkpoint from before the first step has no moments yet.
    other.restore(first.state(), 0)
    assert torch.equal(first.state()[name], other.state()[name])
    assert torch.equal(begin(narrow, 1).state()[name], torch.eye(64))
    with pytest.raises(CheckpointError, match="another shape"):
        other.restore(begin(narrow, 1).state(), 0)


def test_a_run_does_not_go_on_with_other_pairs(configure: Callable[..., TrainConfig]) -> None:
    config = configure("pairs", max_steps=1, held_out_traces=0)
    run_train(config)
    for loss in (("forward-kl",), ("forward-kl", "hidden-cosine@1=1"), (*LOSS[:2], "hidden-mse")):
        with pytest.raises(CheckpointError, match="other parameters") as refused:
            run_train(replace(config, loss=loss, resume=True))
        assert "hidden terms" in refused.value.remedy


def test_streams_whose_states_do_not_fit_together_are_refused(
    service: ServiceProcess, teacher: StudentModel, configure: Callable[..., TrainConfig]
) -> None:
    (deep,) = configure("any").streams
    names = f"wider-{next(numbers)}", f"fewer-{next(numbers)}"
    spec = deep_spec(teacher, names[0])
    assert spec.codec.hidden is not None
    wider = replace(spec.codec, hidden=replace(spec.codec.hidden, hidden_size=96))
    with TraceClient(service.target) as client:
        client.create_stream(replace(spec, codec=wider))
        client.create_stream(deep_spec(teacher, names[1], (1, FINAL_NORM)))
        client.seal_stream(names[1])
    with pytest.raises(
        MisalignmentError, match=f"64 wide in stream '{deep}', .*96 wide in stream '{names[0]}'"
    ):
        run_train(configure("wider", streams=(deep, names[0])))
    with pytest.raises(MisalignmentError, match=f"in stream '{names[1]}'"):
        run_train(configure("fewer", streams=(deep, names[1]), loss=("hidden-cosine",)))
    # The two of them have layers in common.
    run = configure("named", streams=(deep, names[1]), loss=("hidden-cosine@1=1",), held_out_traces=0)
    assert run_train(replace(run, max_steps=1)).steps == 1


def test_a_trace_without_states_among_others_ends_the_run_before_its_step(
    service: ServiceProcess,
    teacher: StudentModel,
    traces: list[Trace],
    deep_traces: list[Trace],
    configure: Callable[..., TrainConfig],
) -> None:
    offer_deep(service.target, teacher, [*deep_traces[8:15], *traces[15:22], *deep_traces[22:]], "patchy")
    config = configure("patchy", streams=("patchy",), held_out_traces=0)
    with pytest.raises(MisalignmentError, match=r"prompt 'p1[5-9]' carries none") as refused:
        run_train(config)
    assert "capture the stream again" in refused.value.remedy
    directory = latest_checkpoint(config.out)
    assert directory is not None
    # Of the second batch of four, the last has none: it was not trained on.
    assert load_checkpoint(directory).state.step == 1
    # Without the term nothing is missing.
    report = run_train(
        replace(config, loss=("forward-kl",), out=config.out.with_name("without"), max_steps=4)
    )
    assert report.curve[-1].hidden is None


@pytest.mark.slow
def test_ranks_share_the_projections_gradients(configure: Callable[..., TrainConfig]) -> None:
    alone, together = configure("alone", max_steps=4), configure("together", max_steps=4)
    join([start_run(alone)])
    run_ranks(together, 2)
    directories = [latest_checkpoint(config.out) for config in (alone, together)]
    curves = [load_checkpoint(directory).state.curve for directory in directories if directory is not None]
    assert [record.hidden for record in curves[1]] == pytest.approx(
        [record.hidden for record in curves[0]], rel=1e-4
    )
    wanted = optimizer_of(alone)
    for name, tensor in optimizer_of(together).items():
        if name.startswith("projection."):
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-2, atol=2e-4)
