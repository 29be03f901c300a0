"""What a loss may be told, what it refuses, and how much each position counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from student.teaching_material import make_spec

from lynearm.student.batches import PieceSizes, collate
from lynearm.student.config import TrainConfig
from lynearm.student.model import StudentModel
from lynearm.student.objective import LossTerm, Objective, make_objective, parse_term
from lynearm.student.weighting import PositionWeighting
from lynearm.wire.errors import ConfigError, MisalignmentError
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import TokenSpan, Trace


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("forward-kl", LossTerm("forward-kl")),
        (" reverse-kl:0.25 ", LossTerm("reverse-kl", 0.25)),
        ("jsd", LossTerm("jsd", mix=0.5)),
        ("skew-kl@0.2:3", LossTerm("skew-kl", 3.0, 0.2)),
        ("cross-entropy:1e-1", LossTerm("cross-entropy", 0.1)),
    ],
)
def test_a_term_is_read_and_written(text: str, term: LossTerm) -> None:
    assert parse_term(text) == term
    assert parse_term(str(term)) == term


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("kl:1", "'kl' is not known"),
        ("forward-kl:x", "'x' is not a number"),
        ("forward-kl:0", "weight is 0"),
        ("forward-kl:nan", "weight is nan"),
        ("forward-kl:-1", "weight is -1"),
        ("forward-kl@0.5", "mixes nothing"),
        ("jsd@1", "mix is 1"),
        ("jsd@nan", "mix is nan"),
        ("jsd@0.5@0.5", "cannot be read"),
    ],
)
def test_what_is_no_term_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(loss=(text,))


def test_a_sum_has_each_loss_once() -> None:
    with pytest.raises(ConfigError, match="none"):
        TrainConfig(rollout_loss=())
    with pytest.raises(ConfigError, match="each one once"):
        TrainConfig(loss=("forward-kl", "forward-kl:2"))
    both = TrainConfig(loss=("jsd@0.1", "jsd@0.9", "cross-entropy"))
    assert Objective(tuple(map(parse_term, both.loss))).cross_entropy_weight == 1.0


@pytest.mark.parametrize("weights", [{"span_weights": {"thought": 1.0}}, {"tag_weights": {"code": 1.0}}])
def test_a_weight_of_nothing_known_is_refused(weights: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ConfigError, match=next(iter(weights))):
        TrainConfig(**weights)  # type: ignore[arg-type]  # fields by name


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="answer is -1"):
        TrainConfig(span_weights={"answer": -1.0})


@pytest.fixture
def warm_spec(teacher: StudentModel) -> StreamSpec:
    spec = make_spec(teacher)
    return replace(spec, teacher=replace(spec.teacher, logprobs_temperature=2.0))


def test_another_temperature_is_refused_until_it_is_asked_for(warm_spec: StreamSpec) -> None:
    with pytest.raises(MisalignmentError, match="at temperature 2, the loss compares at 1"):
        make_objective(warm_spec, ["forward-kl"])
    assert make_objective(warm_spec, ["forward-kl"], temperature=2.0).teacher_temperature == 2.0
    retempered = make_objective(warm_spec, ["forward-kl"], temperature=0.5, retemper=True)
    assert (retempered.teacher_temperature, retempered.temperature) == (2.0, 0.5)
    # Hard labels have no temperature.
    assert make_objective(warm_spec, ["cross-entropy"]).divergences == ()


def test_draws_suit_the_losses_that_they_leave_unbiased(teacher: StudentModel) -> None:
    spec = make_spec(teacher)
    drawn = replace(spec, codec=CodecSpec("sampled", 50, draws=50))
    make_objective(drawn, ["sampled-kd:0.9", "cross-entropy:0.1"])
    make_objective(drawn, ["forward-kl"])
    for loss in ("reverse-kl", "jsd", "skew-kl", "skew-reverse-kl"):
        with pytest.raises(MisalignmentError, match=f"{loss} is biased"):
            make_objective(drawn, [loss])
    with pytest.raises(MisalignmentError, match="no tail is left over"):
        make_objective(drawn, ["forward-kl", "tail-cross-entropy"])
    make_objective(spec, ["forward-kl", "tail-cross-entropy"])
    with pytest.raises(MisalignmentError, match="another temperature is biased"):
        make_objective(drawn, ["sampled-kd"], temperature=2.0, retemper=True)
    with pytest.raises(MisalignmentError, match="holds no draws"):
        make_objective(spec, ["sampled-kd"])


def test_draws_from_the_tail_are_of_one_temperature(warm_spec: StreamSpec) -> None:
    drawn = replace(warm_spec, codec=replace(warm_spec.codec, tail_draws=1))
    terms = ["forward-kl", "tail-cross-entropy"]
    assert make_objective(drawn, terms, temperature=2.0).tail_cross_entropy_weight == 1.0
    with pytest.raises(MisalignmentError, match="are at temperature 2, the loss compares at 1: nothing says"):
        make_objective(drawn, terms, retemper=True)
    make_objective(drawn, ["forward-kl"], retemper=True)
    # The token that was written says at what temperature it was drawn, trace by trace.
    make_objective(warm_spec, terms, retemper=True)


def test_a_stream_with_draws_from_the_tail_is_learnt_with_them_by_default(
    teacher: StudentModel, warm_spec: StreamSpec
) -> None:
    def default(spec: StreamSpec, **settings: Any) -> list[str]:
        return [str(term) for term in make_objective(spec, TrainConfig().loss, **settings).terms]

    plain = make_spec(teacher)
    assert default(plain) == ["forward-kl:1", "cross-entropy:0.1"]
    drawn = replace(plain, codec=replace(plain.codec, tail_draws=1))
    assert default(drawn) == ["forward-kl:1", "cross-entropy:0.1", "tail-cross-entropy:1"]
    warm = replace(warm_spec, codec=drawn.codec)
    assert default(warm, temperature=2.0) == default(drawn)
    assert default(warm, retemper=True) == default(plain)


def test_spans_and_tags_weigh_positions(traces: list[Trace]) -> None:
    trace = next(trace for trace in traces if len(trace.completion_token_ids) >= 6)
    marked = replace(
        trace,
        spans=(TokenSpan("reasoning", 1, 3), TokenSpan("answer", 4, 5)),
        tags={"domain": "maths", "level": "hard"},
    )
    weighting = PositionWeighting(
        {"reasoning": 0.5, "other": 0.0}, {"domain=maths": 2.0, "level=hard": 3.0, "level=easy": 9.0}
    )
    weights_T = weighting.weigh(marked)
    assert weights_T[:6].tolist() == [0.0, 3.0, 3.0, 0.0, 6.0, 0.0]
    assert weighting.total([marked], 4096) == 12.0
    # A completion that is cut counts for what is left of it.
    assert weighting.total([marked], len(marked.prompt_token_ids) + 2) == 3.0
    assert weighting.total([marked], 1) == 0.0


@pytest.mark.parametrize("packed", [False, True])
def test_targets_carry_the_weights_of_their_positions(traces: list[Trace], packed: bool) -> None:
    chosen = [replace(trace, tags={"n": str(number)}) for number, trace in enumerate(traces[:6])]
    weighting = PositionWeighting(tags={f"n={number}": float(number) for number in range(6)})
    pieces = collate(chosen, PieceSizes(64, 64, packed=packed), vocab_size=512, weighting=weighting)
    found = sum(
        float(piece.targets.weights_N.sum()) for piece in pieces if piece.targets.weights_N is not None
    )
    assert found == weighting.total(chosen, 64)
    assert found == sum(number * len(trace.completion_token_ids) for number, trace in enumerate(chosen))
    (even,) = collate(chosen[:1], PieceSizes(64, 64), vocab_size=512)
    assert even.targets.weights_N is None


def test_weights_are_float32_and_one_where_nothing_is_said(traces: list[Trace]) -> None:
    weights_T = PositionWeighting().weigh(traces[0])
    assert weights_T.dtype == np.float32
    assert (weights_T == 1).all()
