"""What a rollout process keeps through a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from rollouts.building import VOCAB, make_wave

from lynearm.rollouts.spool import Spool, SpoolPosition
from lynearm.wire.errors import StorageError


def test_a_wave_is_there_until_it_is_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    later, earlier = make_wave(100, 3, 7), make_wave(4, 2, 6)
    names = [spool.keep_rollouts(wave, offset=5, vocab_size=VOCAB) for wave in (later, earlier)]
    spool.keep_scored(names[1], [b"first", b"second"])
    found = list(Spool(tmp_path / "spool").unfinished())
    assert [(one.wave.first, one.offset, one.blocks) for one in found] == [
        (4, 5, (b"first", b"second")),
        (100, 5, ()),
    ]
    assert found[1].wave.step == 7
    for ours, theirs in zip(found[0].wave.rollouts, earlier.rollouts, strict=True):
        assert (ours.top_k.token_ids == theirs.top_k.token_ids).all()
        assert ours.tags == theirs.tags
    for name in names:
        spool.forget(name)
    assert not list(spool.unfinished())
    assert not list((tmp_path / "spool").iterdir())


def test_a_wave_whose_scores_were_not_all_kept_counts_as_not_scored(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    name = spool.keep_rollouts(make_wave(0, 2, 1), offset=0, vocab_size=VOCAB)
    spool.keep_scored(name, [b"first", b"second"])
    # Killed between the two: the last one is written first.
    (tmp_path / f"{name}.0.scored").unlink()
    (one,) = spool.unfinished()
    assert one.blocks == ()


def test_what_is_half_written_or_damaged_is_passed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    name = spool.keep_rollouts(make_wave(0, 2, 1), offset=0, vocab_size=VOCAB)
    path = tmp_path / f"{name}.student"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "wave-0000000009-0000000000.student.unfinished").write_bytes(b"half")
    (tmp_path / "wave-of-somebody.student").write_bytes(b"")
    assert not list(Spool(tmp_path).unfinished())
    assert not path.exists()
    assert not list(tmp_path.glob("*.unfinished"))


def test_positions_survive_and_a_damaged_one_is_the_beginning(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.position() == SpoolPosition(0, 0)
    spool.move_to(SpoolPosition(32, 7))
    assert Spool(tmp_path).position() == SpoolPosition(32, 7)
    (tmp_path / "position.json").write_text("{")
    assert spool.position() == SpoolPosition(0, 0)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Spool(tmp_path / "file" / "spool")
