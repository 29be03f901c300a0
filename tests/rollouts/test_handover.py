"""Weights on their way from a trainer to an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lynearm.rollouts.handover import HandedWeights, keep_only, read_probe, write_handover
from lynearm.rollouts.probe import Probe, probe_token_ids
from lynearm.wire.errors import CheckpointError


def make_probe(vocab_size: int = 50) -> Probe:
    token_ids = probe_token_ids(vocab_size)
    logprobs = np.log(np.random.default_rng(0).dirichlet(np.ones(vocab_size), len(token_ids)))
    return Probe(token_ids, logprobs.astype(np.float32))


def hand_over(directory: Path, step: int) -> Path:
    def save(target: Path) -> None:
        (target / "model.safetensors").write_bytes(f"weights of {step}".encode())

    return write_handover(directory, HandedWeights(step, save, make_probe()))


def test_weights_lie_whole_under_their_step(tmp_path: Path) -> None:
    directory = hand_over(tmp_path / "weights", 12)
    assert directory.name == "step-00000012"
    assert (directory / "model.safetensors").read_bytes() == b"weights of 12"
    probe = read_probe(directory)
    assert np.array_equal(probe.logprobs, make_probe().logprobs)
    # The same step again, as by a run that goes over it once more.
    assert hand_over(tmp_path / "weights", 12) == directory


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def save(target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"weights of step 3 cannot be handed over.*No space left"):
        write_handover(tmp_path / "weights", HandedWeights(3, save, make_probe()))
    assert not list((tmp_path / "weights").iterdir())


def test_only_what_is_wanted_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        hand_over(tmp_path, step)
    (tmp_path / ".unfinished-step-00000004").mkdir()
    (tmp_path / "somebody's").mkdir()
    keep_only(tmp_path, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003", "somebody's"}
    keep_only(tmp_path / "not there")


def test_an_engines_answer_is_compared_where_it_gives_one() -> None:
    probe = make_probe()
    ids = np.argsort(-probe.logprobs, 1)[:, :5].astype(np.int32)
    rows = np.take_along_axis(probe.logprobs, ids.astype(np.int64), 1)
    assert probe.error_of(ids, rows) == 0
    rows[2, 1] += np.float32(0.25)
    assert probe.error_of(ids, rows) == pytest.approx(0.25)
    rows[0, 0] = np.nan
    assert probe.error_of(ids, rows) == np.inf


@pytest.mark.parametrize("vocab_size", [1, 17, 384, 49_152, 151_936])
def test_probe_prompts_are_tokens_and_differ(vocab_size: int) -> None:
    token_ids = probe_token_ids(vocab_size)
    assert token_ids.min() >= 0
    assert token_ids.max() < vocab_size
    if vocab_size > 100:
        assert len({tuple(row) for row in token_ids.tolist()}) == len(token_ids)


def test_a_probe_that_is_damaged_is_refused(tmp_path: Path) -> None:
    directory = hand_over(tmp_path, 1)
    (directory / "probe.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no probe"):
        read_probe(directory)
