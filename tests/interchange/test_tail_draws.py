"""Tokens drawn from the tails go out into Parquet, and come in again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interchange.material import (
    VOCAB_SIZE,
    assert_same,
    create,
    make_spec,
    make_trace,
    make_traces,
    read,
    run,
    spec_of,
)

from lynearm.interchange.parquet_reader import ParquetTraceSource
from lynearm.interchange.parquet_writer import ParquetTraceWriter
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import Trace

DRAWS = 3


def with_draws(trace: Trace, draws: int = DRAWS) -> Trace:
    """The trace with tokens drawn from its tails, from every second one nothing."""
    rng = np.random.default_rng(trace.top_k.positions)
    draws_TD = np.full((trace.top_k.positions, draws), -1, np.int32)
    for t in range(0, trace.top_k.positions, 2):
        others = np.setdiff1d(np.arange(VOCAB_SIZE), trace.top_k.token_ids[t])
        draws_TD[t] = rng.choice(others, draws)
    return dataclasses.replace(trace, top_k=dataclasses.replace(trace.top_k, tail_draws=draws_TD))


def drawn_traces() -> list[Trace]:
    return [with_draws(trace) for trace in make_traces()]


def write(path: Path, traces: list[Trace], draws: int = DRAWS) -> Path:
    with ParquetTraceWriter(path, make_spec("s", tail_draws=draws)) as writer:
        writer.write(traces)
    return path


def read_back(path: Path) -> list[Trace]:
    return [trace for prompt in ParquetTraceSource(path).prompts() for trace in prompt.traces]


def test_what_is_exported_and_imported_has_the_same_draws(target: str, tmp_path: Path) -> None:
    spec, path = make_spec("drawn", tail_draws=DRAWS), tmp_path / "drawn.parquet"
    create(target, spec, [])
    assert run("import", write(path, drawn_traces()), "--stream", "drawn", "--service", target)[0] == 0
    code, _, stderr = run("streams", "export", "drawn", "--out", path, "--service", target, "--overwrite")
    assert code == 0, stderr
    assert run("import", path, "--stream", "drawn-again", "--service", target)[0] == 0
    assert_same(read(target, "drawn-again"), drawn_traces())
    assert spec_of(target, "drawn-again").codec == spec.codec


def test_a_stream_without_draws_has_no_column_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", make_traces(), draws=0)
    assert "tail_draws" not in pq.read_schema(path).names
    assert_same(read_back(path), make_traces())


def test_a_file_without_a_spec_says_how_many_draws_there_are(target: str, tmp_path: Path) -> None:
    empty, *others = sorted(drawn_traces(), key=lambda trace: trace.top_k.positions)
    assert empty.top_k.positions == 0
    path = write(tmp_path / "f.parquet", [empty, *others])
    pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    create(target, make_spec("like-drawn", tail_draws=DRAWS), [])
    assert ParquetTraceSource(path).tail_draws == DRAWS
    assert run("import", path, "--stream", "like-drawn", "--service", target)[0] == 0
    assert_same(read(target, "like-drawn"), [empty, *others])


def test_traces_whose_draws_the_stream_does_not_have_are_refused(target: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", drawn_traces())
    pq.write_table(pq.read_table(path).drop_columns(["tail_draws"]), path)
    code, _, stderr = run("import", path, "--stream", "drawless", "--service", target, "--progress", "none")
    assert code == 1
    assert "row 0: trace of prompt 'q1' has 0 tail draws a position, expected 3" in stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[:-1], "row 0: tail_draws has 4 positions, completion_token_ids 5"),
        (lambda rows: [rows[0][:-1], *rows[1:]], "row 0: tail_draws has positions of 2 and of 3 draws"),
        (lambda rows: [None, *rows[1:]], "rows 0 to 0: tail_draws holds 1 nulls"),
        (lambda rows: [[None] * 3, *rows[1:]], "rows 0 to 0: tail_draws holds 3 nulls"),
    ],
)
def test_wrong_draws_are_named_by_file_and_row(
    tmp_path: Path, change: Callable[[list[Any]], list[Any]], complaint: str
) -> None:
    path = write(tmp_path / "f.parquet", [with_draws(make_trace("a", 1))])
    table = pq.read_table(path)
    index = table.schema.get_field_index("tail_draws")
    spoilt = pa.array([change(table.column(index).to_pylist()[0])], table.schema.field(index).type)
    pq.write_table(table.set_column(index, "tail_draws", spoilt), path)
    with pytest.raises(InvalidInputError, match=complaint):
        read_back(path)


@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4), draws=st.integers(1, 16))
def test_any_draws_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], draws: int
) -> None:
    made = [
        with_draws(make_trace(f"q{number}", number, positions=positions, k=k), draws)
        for number, (positions, k) in enumerate(shapes)
    ]
    assert_same(read_back(write(tmp_path_factory.mktemp("any") / "f.parquet", made, draws)), made)
