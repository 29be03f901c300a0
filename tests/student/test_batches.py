"""Batches: a function of the order of traces, and tensors that hold what the traces say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from student.teaching_material import make_blocks

from lynearm.client import ReceivedBlock
from lynearm.student.batches import Batch, Batcher, PieceSizes, SplitRule, collate
from lynearm.student.mixed_source import MixedSource, Selection
from lynearm.student.mixing import StreamPlan, StreamState
from lynearm.student.model import StudentModel
from lynearm.student.progress import ignore_progress
from lynearm.student.reader import PositionedTrace, TraceReader
from lynearm.student.reporting import Reporter
from lynearm.wire.errors import CorruptBlockError, MisalignmentError
from lynearm.wire.traces import Cursor, SamplingParams, Trace

BEGINNING = Cursor()


def receive(teacher: StudentModel, traces: list[Trace], traces_per_block: int) -> list[ReceivedBlock]:
    blocks = make_blocks(teacher, traces, traces_per_block)
    return [ReceivedBlock(offset, memoryview(block), len(blocks)) for offset, block in enumerate(blocks)]


class BlockSource:
    """Blocks in memory as a stream; the reader on top of them is the trainer's."""

    def __init__(self, blocks: list[ReceivedBlock]) -> None:
        self._blocks = blocks
        self._reader: TraceReader | None = None
        self.next_offset = len(blocks)
        self.received_all = True

    @property
    def is_open(self) -> bool:
        return self._reader is not None

    @property
    def exhausted(self) -> bool:
        return self._reader is None or self._reader.exhausted

    @property
    def damaged_offsets(self) -> tuple[int, ...]:
        return self._reader.damaged_offsets if self._reader else ()

    def open(self, start: Cursor) -> None:
        self.close()
        self._reader = TraceReader(self._blocks[start.offset :], start=start, prefetch_blocks=2)

    def take(self) -> PositionedTrace | None:
        positioned = None
        while positioned is None and self._reader and not self._reader.exhausted:
            positioned = self._reader.poll(5.0)
        return positioned

    def give_back(self, traces: Sequence[PositionedTrace]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self._reader:
            self._reader.close()
        self._reader = None


def mix(blocks: list[ReceivedBlock], start: Cursor, rule: SplitRule) -> MixedSource:
    """One stream, in one pass."""
    return MixedSource(
        [StreamPlan("s")],
        [StreamState("s", 1, cursor=start)],
        [BlockSource(blocks)],
        selection=Selection(rule, 64),
        epochs=1,
        reporter=Reporter(ignore_progress),
    )


def read_batches(
    blocks: list[ReceivedBlock], start: Cursor = BEGINNING, *, batch_sequences: int = 4
) -> list[Batch]:
    batcher = Batcher(batch_sequences=batch_sequences, max_sequence_tokens=64)
    batches: list[Batch] = []
    with mix(blocks, start, SplitRule(0.1)) as source:
        while drawn := source.take(0):
            if batch := batcher.add(drawn):
                batches.append(batch)
    last = batcher.rest()
    return [*batches, last] if last else batches


def names(batches: list[Batch]) -> list[list[str]]:
    return [[trace.prompt_id for trace in batch.traces] for batch in batches]


def test_batches_do_not_depend_on_block_boundaries(teacher: StudentModel, traces: list[Trace]) -> None:
    wanted = names(read_batches(receive(teacher, traces, 60)))
    assert [name for batch in wanted for name in batch] == [f"p{number}" for number in range(8, 60)]
    for traces_per_block in (1, 7, 13):
        assert names(read_batches(receive(teacher, traces, traces_per_block))) == wanted


def test_every_cursor_continues_with_the_next_batch(teacher: StudentModel, traces: list[Trace]) -> None:
    blocks = receive(teacher, traces, 7)
    batches = read_batches(blocks)
    for number, batch in enumerate(batches):
        assert names(read_batches(blocks, batch.after[0].cursor)) == names(batches[number + 1 :])


def test_tags_decide_the_split_and_a_hash_decides_without_them(traces: list[Trace]) -> None:
    rule = SplitRule(0.25, seed=3)
    assert [rule.holds_out(trace) for trace in traces] == [True] * 8 + [False] * 52
    untagged = [replace(traces[0], prompt_id=f"q{number}", tags={}) for number in range(2000)]
    held_out = [rule.holds_out(trace) for trace in untagged]
    assert 0.2 < np.mean(held_out) < 0.3
    assert held_out == [rule.holds_out(replace(trace, sample_index=1)) for trace in untagged]
    assert held_out != [SplitRule(0.25, seed=4).holds_out(trace) for trace in untagged]


def test_traces_without_anything_to_learn_are_skipped_and_counted(
    teacher: StudentModel, traces: list[Trace]
) -> None:
    usable = traces[10]
    empty = replace(
        usable,
        completion_token_ids=usable.completion_token_ids[:0],
        sampled_logprobs=usable.sampled_logprobs[:0],
        top_k=replace(
            usable.top_k,
            token_ids=usable.top_k.token_ids[:0],
            logprobs=usable.top_k.logprobs[:0],
            tail_mass=usable.top_k.tail_mass[:0],
        ),
    )
    long_prompt = replace(usable, prompt_token_ids=np.full(64, 7, np.int32))
    with mix(receive(teacher, [empty, usable, long_prompt], 3), BEGINNING, SplitRule(0.0)) as source:
        drawn = source.take(0)
        assert drawn is not None
        assert source.take(0) is None
        assert source.exhausted
        assert source.skipped_traces == 2


def test_tensors_hold_what_the_traces_say(traces: list[Trace]) -> None:
    chosen = traces[10:16]
    pieces = collate(chosen, PieceSizes(32, 64), vocab_size=384)
    assert len(pieces) > 1
    assert sum(len(piece.targets) for piece in pieces) == sum(len(t.completion_token_ids) for t in chosen)
    by_tokens = {tuple(trace.completion_token_ids.tolist()): trace for trace in chosen}
    for piece in pieces:
        assert piece.input_ids_BL.numel() <= 32 or len(piece.input_ids_BL) == 1
        # Each position's token is followed, in its row, by what the completion has next.
        rows = piece.positions_N // piece.input_ids_BL.shape[1]
        for row in sorted(set(rows.tolist())):
            mine = rows == row
            sampled = tuple(piece.targets.sampled_ids_N[mine].tolist())
            trace = by_tokens[sampled]
            last_prompt = piece.input_ids_BL.flatten()[piece.positions_N[mine][0]]
            assert int(last_prompt) == trace.prompt_token_ids[-1]
            inputs = piece.input_ids_BL[row, : len(trace.prompt_token_ids) + len(sampled) - 1].tolist()
            assert inputs == [*trace.prompt_token_ids, *sampled[:-1]]
            torch.testing.assert_close(piece.targets.logprobs_NK[mine], torch.as_tensor(trace.top_k.logprobs))


def test_long_completions_are_cut(traces: list[Trace]) -> None:
    trace = max(traces, key=lambda one: len(one.completion_token_ids))
    length = len(trace.prompt_token_ids) + 2
    (piece,) = collate([trace], PieceSizes(8, length), vocab_size=384)
    assert piece.targets.sampled_ids_N.tolist() == trace.completion_token_ids[:2].tolist()
    assert piece.input_ids_BL.shape == (1, length - 1)


def test_rows_that_keep_fewer_entries_are_padded(traces: list[Trace]) -> None:
    short = replace(
        traces[0],
        top_k=replace(
            traces[0].top_k,
            token_ids=traces[0].top_k.token_ids[:, :3],
            logprobs=traces[0].top_k.logprobs[:, :3],
        ),
    )
    (piece,) = collate([short, traces[1]], PieceSizes(512, 64), vocab_size=384)
    padded = torch.isinf(piece.targets.logprobs_NK).sum(1)
    assert sorted(set(padded.tolist())) == [0, 5]
    assert int(piece.targets.token_ids_NK[padded == 5][:, 3:].max()) == 0


def test_tensors_hold_the_draws_from_the_tail_of_those_traces_that_have_any(traces: list[Trace]) -> None:
    def with_draws(trace: Trace, draws: int) -> Trace:
        drawn = np.arange(trace.top_k.positions * draws, dtype=np.int32).reshape(-1, draws) % 384
        return replace(trace, top_k=replace(trace.top_k, tail_draws=drawn))

    one, none, two = with_draws(traces[10], 1), traces[11], with_draws(traces[12], 2)
    together = {"sizes": PieceSizes(512, 64, packed=True), "vocab_size": 384}
    assert collate([none], **together)[0].targets.tail_ids_ND is None
    (piece,) = collate([one, none, two], **together)
    found = piece.targets.tail_ids_ND
    assert found is not None
    assert found.dtype == torch.int64
    rows = {0: 0, 1: 0, 2: 0}
    for count in (found >= 0).sum(1).tolist():
        rows[count] += 1
    assert rows == {len_: trace.top_k.positions for len_, trace in ((1, one), (0, none), (2, two))}
    assert one.top_k.tail_draws is not None
    assert two.top_k.tail_draws is not None
    written = sorted([*one.top_k.tail_draws.ravel().tolist(), *two.top_k.tail_draws.ravel().tolist()])
    assert sorted(found[found >= 0].tolist()) == written
    # Cut where the completion is.
    longest = max((one, two), key=lambda trace: trace.top_k.positions)
    cut = len(longest.prompt_token_ids) + 2
    (short,) = collate([longest], PieceSizes(512, cut), vocab_size=384)
    assert short.targets.tail_ids_ND is not None
    assert len(short.targets.tail_ids_ND) == len(short.targets)
    (again,) = collate([longest], PieceSizes(512, 4096), vocab_size=384)
    assert again.targets.tail_ids_ND is not None
    assert torch.equal(again.targets.tail_ids_ND[: len(short.targets)], short.targets.tail_ids_ND)
    assert torch.equal(
        again.targets.rows(1, 3).to(torch.device("cpu")).tail_ids_ND, again.targets.tail_ids_ND[1:3]
    )


def test_tensors_say_which_tokens_are_draws_of_the_teachers_distribution(traces: list[Trace]) -> None:
    plain, greedy = (
        replace(trace, sampling=SamplingParams(temperature, max_tokens=9, seed=1))
        for trace, temperature in zip(traces[10:12], (1.0, 0.0), strict=True)
    )
    together = {"sizes": PieceSizes(512, 64, packed=True), "vocab_size": 384}
    (piece,) = collate([plain, greedy], **together)
    assert piece.targets.drawn_N is not None
    lengths = sorted((len(t.completion_token_ids), t is plain) for t in (plain, greedy))
    counts = {is_plain: count for count, is_plain in lengths}
    assert int(piece.targets.drawn_N.sum()) == counts[True]
    assert len(piece.targets.drawn_N) == counts[True] + counts[False]
    assert collate([plain], **together)[0].targets.drawn_N is None
    (at_another,) = collate([plain], **together, temperature=0.7)
    assert at_another.targets.drawn_N is not None
    assert not at_another.targets.drawn_N.any()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.9},
        {"top_p": 0.95},
        {"top_k": 50},
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 1},
    ],
)
def test_what_changes_a_distribution_makes_draws_of_another(change: dict[str, Any]) -> None:
    plain = SamplingParams(0.7, max_tokens=5, seed=3, stop=("x",), stop_token_ids=(1,))
    assert plain.is_plain(0.7)
    assert plain.is_plain(float(np.float32(0.7)))
    assert not replace(plain, **change).is_plain(0.7)


def test_a_token_beyond_the_vocabulary_is_refused(traces: list[Trace]) -> None:
    with pytest.raises(MisalignmentError, match="vocabulary ends at 9"):
        collate(traces[:1], PieceSizes(64, 64), vocab_size=10)


def test_a_corrupt_block_is_named_after_the_traces_before_it(
    teacher: StudentModel, traces: list[Trace]
) -> None:
    blocks = receive(teacher, traces[:20], 10)
    broken = bytearray(blocks[1].block)
    broken[len(broken) // 2] ^= 0x40
    blocks[1] = replace(blocks[1], block=memoryview(bytes(broken)))
    with TraceReader(blocks, start=Cursor(), prefetch_blocks=4) as reader:
        for _ in range(10):
            assert reader.poll(5.0) is not None
        with pytest.raises(CorruptBlockError, match="block 1"):
            reader.poll(5.0)


def test_a_corrupt_block_is_passed_over_where_that_is_asked_for(
    teacher: StudentModel, traces: list[Trace]
) -> None:
    blocks = receive(teacher, traces[:20], 5)
    blocks[1] = replace(blocks[1], block=memoryview(bytes(blocks[1].block)[:-3]))
    with TraceReader(blocks, start=Cursor(), prefetch_blocks=4, skip_damaged=True) as reader:
        given = [positioned for _ in range(15) if (positioned := reader.poll(5.0)) is not None]
        assert reader.poll(5.0) is None
    assert [one.trace.prompt_id for one in given] == [f"p{n}" for n in (*range(5), *range(10, 20))]
    assert given[4].after == Cursor(1, 0)
    assert reader.damaged_offsets == (1,)


def test_the_reader_runs_no_further_ahead_than_it_may(teacher: StudentModel, traces: list[Trace]) -> None:
    blocks = receive(teacher, traces[:12], 1)
    with TraceReader(blocks, start=Cursor(), prefetch_blocks=2) as reader:
        assert reader.poll(5.0) is not None
        assert not reader.received_all
        taken = 1
        while not reader.exhausted:
            taken += reader.poll(5.0) is not None
        assert taken == 12
        assert reader.received_all
