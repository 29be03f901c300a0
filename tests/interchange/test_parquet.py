"""A stream as a Parquet file, and back, against a real trace service; and what other programs make of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interchange.material import (
    K,
    assert_same,
    create,
    exists,
    make_spec,
    make_trace,
    make_traces,
    read,
    run,
    spec_of,
)

from lynearm.client import TraceClient
from lynearm.interchange import ImportConfig, parquet_reader, parquet_writer
from lynearm.interchange.exporting import export_parquet
from lynearm.interchange.importing import import_files
from lynearm.interchange.parquet_reader import ParquetTraceSource
from lynearm.interchange.parquet_writer import ParquetTraceWriter
from lynearm.wire.errors import ConfigError, InvalidInputError, MissingDependencyError, UnsupportedFormatError
from lynearm.wire.traces import FINISH_REASONS, SPAN_KINDS, SamplingParams, TokenSpan, TopK, Trace

SPEC_FLAGS = (
    *("--license", "CC-BY-4.0", "--teacher-model", "teacher", "--teacher-revision", "sha256:00"),
    *("--vocab-size", "512", "--max-model-len", "4096", "--top-k", str(K), "--codec", "exact"),
)


def write(path: Path, traces: Sequence[Trace], name: str = "s", *, overwrite: bool = False) -> Path:
    with ParquetTraceWriter(path, make_spec(name), overwrite=overwrite) as writer:
        writer.write(traces)
    return path


def read_back(path: Path) -> list[Trace]:
    return [trace for prompt in ParquetTraceSource(path).prompts() for trace in prompt.traces]


def change(path: Path, name: str, column: Callable[[list[Any]], list[Any]], kind: Any = None) -> Path:
    """Write a file again with another column in the place of one."""
    table = pq.read_table(path)
    index = table.schema.get_field_index(name)
    values = column(table.column(index).to_pylist())
    changed = table.set_column(index, name, pa.array(values, kind or table.schema.field(index).type))
    pq.write_table(changed, path)
    return path


@pytest.fixture(scope="module")
def exported(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of stream `source`, which has `make_traces` in three blocks."""
    traces = make_traces()
    create(target, make_spec("source"), [traces[:3], traces[3:4], traces[4:]])
    path = tmp_path_factory.mktemp("exported") / "source.parquet"
    code, stdout, stderr = run("streams", "export", "source", "--out", path, "--service", target)
    assert code == 0, stderr
    assert f"{path}: 8 traces, 35 tokens" in stdout
    assert "up to offset 3" in stdout
    return path


def test_what_is_exported_and_imported_is_equal(target: str, exported: Path) -> None:
    code, stdout, stderr = run("import", exported, "--stream", "again", "--seal", "--service", target)
    assert code == 0, stderr
    assert "stream again: 8 traces of 7 prompts imported, 35 tokens" in stdout
    assert "sealed" in stdout
    assert_same(read(target, "again"), make_traces())
    assert spec_of(target, "again") == dataclasses.replace(make_spec("source"), name="again")


def test_a_second_import_says_what_it_skips(target: str, exported: Path) -> None:
    run("import", exported, "--stream", "twice", "--service", target)
    code, stdout, _ = run("import", exported, "--stream", "twice", "--seal", "--service", target)
    assert code == 0
    assert "0 traces of 0 prompts imported" in stdout
    assert "skipped 7 prompts, 8 traces, that it had already" in stdout
    assert len(read(target, "twice")) == 8
    # Sealed and complete: a third run has nothing to do.
    assert run("import", exported, "--stream", "twice", "--service", target)[0] == 0


def test_the_stream_is_the_one_that_the_file_names(target: str, exported: Path) -> None:
    code, stdout, _ = run("import", exported, "--service", target)
    assert code == 0
    assert "stream source: 0 traces" in stdout
    assert "skipped 7 prompts" in stdout


def test_flags_override_what_the_file_says(target: str, exported: Path) -> None:
    code, _, stderr = run(
        *("import", exported, "--stream", "overridden", "--codec", "standard", "--license", "MIT"),
        *("--service", target),
    )
    assert code == 0, stderr
    spec = spec_of(target, "overridden")
    assert (spec.codec.mode, spec.license, spec.teacher) == ("standard", "MIT", make_spec("x").teacher)
    code, _, stderr = run("import", exported, "--stream", "overridden", "--service", target)
    assert code == 1
    assert "codec.mode is 'standard', wanted 'exact'" in stderr


def test_progress_counts_traces_tokens_and_bytes(target: str, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.parquet"
    _, stdout, _ = run("streams", "export", "source", "--out", out, "--service", target, "--progress", "json")
    *events, report = map(json.loads, stdout.splitlines())
    assert {event["event"] for event in events} == {"export_progress"}
    assert [event["traces"] for event in events] == [3, 4, 8]
    assert (report["event"], report["tokens"], report["path"]) == ("export_report", 35, str(out))
    _, stdout, _ = run(
        *("import", out, "--stream", "progress", "--service", target, "--progress", "json"),
    )
    *events, report = map(json.loads, stdout.splitlines())
    assert events[-1]["read_bytes"] <= events[-1]["total_bytes"] == out.stat().st_size
    assert (report["event"], report["traces"], report["tokens"]) == ("import_report", 8, 35)


def test_pandas_opens_it(exported: Path) -> None:
    import pandas

    frame = pandas.read_parquet(exported)
    assert list(frame.prompt_id) == [trace.prompt_id for trace in make_traces()]
    for row, trace in zip(frame.itertuples(), make_traces(), strict=True):
        kept = trace.top_k.logprobs > -np.inf
        assert [list(ids) for ids in row.top_k_token_ids] == [
            trace.top_k.token_ids[t][kept[t]].tolist() for t in range(trace.top_k.positions)
        ]
        assert row.sampled_logprobs.dtype == np.float32
        assert row.sampled_logprobs.tobytes() == trace.sampled_logprobs.tobytes()
        assert {tag["key"]: tag["value"] for tag in row.tags} == dict(trace.tags)
        assert row.sampling["temperature"] == trace.sampling.temperature


def test_polars_opens_it(exported: Path) -> None:
    import polars

    frame = polars.read_parquet(exported)
    assert frame.schema["top_k_logprobs"] == polars.List(polars.List(polars.Float32))
    assert frame.schema["prompt_token_ids"] == polars.List(polars.Int32)
    assert frame["completion_text"].to_list() == [trace.completion_text for trace in make_traces()]
    lengths = frame.select(polars.col("top_k_logprobs").list.len()).to_series().to_list()
    assert lengths == [trace.top_k.positions for trace in make_traces()]


def test_datasets_opens_it(exported: Path, tmp_path: Path) -> None:
    dataset = load_dataset(exported, tmp_path)
    assert dataset.num_rows == 8
    expected = make_traces()[0]
    assert dataset[0]["completion_token_ids"] == expected.completion_token_ids.tolist()
    assert dataset[0]["spans"] == [
        {"kind": span.kind, "start": span.start, "end": span.end} for span in expected.spans
    ]
    assert np.float32(dataset[0]["tail_mass"]).tobytes() == expected.top_k.tail_mass.tobytes()


def load_dataset(path: Path, cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(cache))


def write_with_pandas(source: Path, path: Path, _: Path) -> None:
    import pandas

    pandas.read_parquet(source).to_parquet(path)


def write_with_polars(source: Path, path: Path, _: Path) -> None:
    import polars

    polars.read_parquet(source).write_parquet(path)


def write_with_datasets(source: Path, path: Path, cache: Path) -> None:
    load_dataset(source, cache).to_parquet(str(path))


@pytest.mark.parametrize("writer", [write_with_pandas, write_with_polars, write_with_datasets])
def test_what_others_write_again_is_imported(
    writer: Callable[[Path, Path, Path], None], target: str, exported: Path, tmp_path: Path
) -> None:
    path = tmp_path / "again.parquet"
    writer(exported, path, tmp_path / "cache")
    assert_same(read_back(path), make_traces())


def test_a_file_without_a_spec_needs_flags_or_an_existing_stream(
    target: str, exported: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bare.parquet"
    write_with_polars(exported, path, tmp_path)
    code, stdout, stderr = run("import", path, "--service", target, "--progress", "none")
    assert (code, stdout) == (2, "")
    for flag in ("--stream", "--tokenizer", "--license", "--teacher-model", "--teacher-revision", "--top-k"):
        assert flag in stderr
    assert stderr.count("\n") == 1
    create(target, make_spec("like-source"), [])
    assert run("import", path, "--stream", "like-source", "--service", target)[0] == 0
    assert_same(read(target, "like-source"), make_traces())


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
FLOATS = st.floats(-50, 0, width=32)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    positions, k = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    rows = [sorted(draw(st.lists(FLOATS, max_size=k)), reverse=True) for _ in range(positions)]
    logprobs = np.full((positions, k), -np.inf, np.float32)
    for t, row in enumerate(rows):
        logprobs[t, : len(row)] = row
    ids = st.integers(0, 2**31 - 1)
    token_ids = np.array(
        [draw(st.lists(ids, min_size=k, max_size=k)) for _ in range(positions)], np.int32
    ).reshape(positions, k)
    per_position = st.lists(st.floats(0, 1, width=32), min_size=positions, max_size=positions)
    cuts = sorted(draw(st.sets(st.integers(0, positions), max_size=3)))
    kinds = st.sampled_from(SPAN_KINDS)
    return Trace(
        prompt_id=draw(TEXT),
        prompt_token_ids=np.array(draw(st.lists(ids, max_size=5)), np.int32),
        completion_token_ids=np.array(draw(st.lists(ids, min_size=positions, max_size=positions)), np.int32),
        sampled_logprobs=-np.array(draw(per_position), np.float32),
        top_k=TopK(token_ids, logprobs, np.array(draw(per_position), np.float32)),
        finish_reason=draw(st.sampled_from(FINISH_REASONS)),
        sample_index=draw(st.integers(-(2**63), 2**63 - 1)),
        spans=tuple(TokenSpan(draw(kinds), a, b) for a, b in itertools.pairwise(cuts)),
        sampling=SamplingParams(
            draw(st.floats(0, 9)), draw(st.floats(0, 1)), draw(st.integers(0, 99)), draw(st.floats(0, 1)),
            draw(st.integers(0, 2**40)), draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
            draw(st.floats(-2, 2)), draw(st.floats(-2, 2)), draw(st.floats(0.5, 2)), draw(st.integers(0, 9)),
            tuple(draw(st.lists(TEXT, max_size=2))), tuple(draw(st.lists(ids, max_size=2))),
        ),
        tags=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        completion_text=draw(TEXT),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches=st.lists(st.lists(traces(), max_size=4), max_size=3))
def test_any_traces_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Trace]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "f.parquet"
    with ParquetTraceWriter(path, make_spec("s")) as writer:
        for batch in batches:
            writer.write(batch)
    assert_same(read_back(path), [trace for batch in batches for trace in batch])


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_writer, "ROW_GROUP_BYTES", 2000)
    path = tmp_path / "f.parquet"
    made = [make_trace(f"q{i}", i) for i in range(40)]
    with ParquetTraceWriter(path, make_spec("s")) as writer:
        for trace in made:
            writer.write([trace])
    assert writer.row_groups == pq.ParquetFile(path).metadata.num_row_groups > 5
    assert_same(read_back(path), made)


def test_a_file_of_one_huge_row_group_is_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_writer, "ROW_GROUP_BYTES", 1 << 40)
    monkeypatch.setattr(parquet_reader, "BATCH_BYTES", 1 << 20)
    path = tmp_path / "f.parquet"
    rng = np.random.default_rng(0)
    logprobs = -np.sort(rng.exponential(5, (64, 64)).astype(np.float32) + 5, axis=1)
    ids = rng.integers(0, 512, (64, 64)).astype(np.int32)
    one = make_trace("q", positions=64, top_k=TopK(ids, logprobs, np.zeros(64, np.float32)))
    with ParquetTraceWriter(path, make_spec("s")) as writer:
        for number in range(800):
            writer.write([dataclasses.replace(one, prompt_id=f"q{number}")])
    whole = pq.read_table(path).nbytes
    assert whole > 25 << 20
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in ParquetTraceSource(path).prompts())
    assert most < 8 << 20


def test_a_file_is_not_overwritten_unasked(target: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.parquet"
    path.write_text("precious")
    code, _, stderr = run("streams", "export", "source", "--out", path, "--service", target)
    assert code == 2
    assert "--overwrite" in stderr
    assert path.read_text() == "precious"
    assert run("streams", "export", "source", "--out", path, "--overwrite", "--service", target)[0] == 0
    assert_same(read_back(path), make_traces())
    assert [one.name for one in tmp_path.iterdir()] == ["kept.parquet"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    with contextlib.suppress(RuntimeError), ParquetTraceWriter(path, make_spec("s")) as writer:
        writer.write(make_traces())
        assert [one.name for one in tmp_path.iterdir()] == ["f.parquet.part"]
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_export_of_nothing_is_a_file_without_rows(target: str, tmp_path: Path) -> None:
    create(target, make_spec("hollow"), [])
    path = tmp_path / "f.parquet"
    assert run("streams", "export", "hollow", "--out", path, "--service", target)[0] == 0
    assert read_back(path) == []
    assert run("import", path, "--stream", "hollow-again", "--service", target)[0] == 0
    assert exists(target, "hollow-again")


@pytest.mark.parametrize("out", ["absent/f.parquet", "."])
def test_an_export_to_nowhere_is_a_usage_error(target: str, exported: Path, tmp_path: Path, out: str) -> None:
    code, _, stderr = run("streams", "export", "source", "--out", tmp_path / out, "--service", target)
    assert code == 2
    assert str(tmp_path) in stderr


def test_an_unknown_stream_is_one_line_and_no_file(target: str, tmp_path: Path) -> None:
    code, _, stderr = run("streams", "export", "absent", "--out", tmp_path / "f.parquet", "--service", target)
    assert code == 1
    assert "'absent'" in stderr
    assert not list(tmp_path.iterdir())


Change = Callable[[list[Any]], list[Any]]

LIST_OF_STRINGS = pa.list_(pa.string())
LISTS_OF_LONG = pa.list_(pa.list_(pa.int64()))


def nth(index: int, change_one: Callable[[Any], Any]) -> Change:
    return lambda column: [change_one(one) if i == index else one for i, one in enumerate(column)]


@pytest.mark.parametrize(
    ("name", "change_column", "kind", "complaint"),
    [
        ("completion_token_ids", nth(1, lambda ids: ids[:-1]), None, "row 1: sampled_logprobs has 5"),
        ("tail_mass", nth(0, lambda _: []), None, "row 0: tail_mass has 0 positions, completion_token_ids 5"),
        ("tail_mass", nth(1, lambda row: [float("nan"), *row[1:]]), None, "row 1: trace of prompt 'b'"),
        ("tail_mass", nth(1, lambda row: [None, *row[1:]]), None, "rows 0 to 2: tail_mass holds 1 nulls"),
        ("tail_mass", nth(1, lambda row: [3.0, *row[1:]]), None, "row 1: trace of prompt 'b'"),
        ("tail_mass", lambda c: [list(map(str, row)) for row in c], LIST_OF_STRINGS, "is list<"),
        ("top_k_token_ids", nth(2, lambda rows: rows[:-1]), None, "row 2: top_k_token_ids has 2 positions"),
        ("top_k_token_ids", nth(2, lambda rows: [rows[0][:-1], *rows[1:]]), None, "row 2: position 0 has 1"),
        ("top_k_token_ids", nth(2, lambda rows: [[1, 900], *rows[1:]]), None, "row 2: trace of prompt 'c'"),
        ("top_k_token_ids", lambda c: [[[2**40] * len(r) for r in t] for t in c], LISTS_OF_LONG,
         "column top_k_token_ids: Integer value"),
        ("top_k_logprobs", nth(2, lambda rows: [rows[0][::-1], *rows[1:]]), None, "are not sorted"),
        ("top_k_logprobs", nth(2, lambda rows: [None, *rows[1:]]), None, "top_k_logprobs holds 1 nulls"),
        ("top_k", nth(2, lambda _: 1), None, "row 2: top_k is 1, and a position has 2 entries"),
        ("top_k", nth(2, lambda _: 9), None, "row 2: positions of 9 entries, and the stream keeps 6"),
        ("finish_reason", nth(0, lambda _: "done"), None, "row 0: finish_reason is 'done'"),
        ("prompt_id", nth(1, lambda _: None), None, "row 1: prompt_id is null"),
        ("prompt_id", nth(2, lambda _: "a"), None, "row 2 is of prompt 'a', which is also in"),
        ("prompt_id", lambda c: list(range(len(c))), pa.int64(), "column prompt_id is int64"),
        ("spans", nth(0, lambda _: [{"kind": "answer", "start": 2, "end": 99}]), None, "row 0: trace"),
        ("spans", nth(0, lambda _: [{"kind": "song", "start": 0, "end": 1}]), None, "row 0: span"),
        ("tags", nth(0, lambda _: [{"key": "a", "value": None}]), None, "row 0: tag"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_by_file_and_row(
    target: str, tmp_path: Path, name: str, change_column: Change, kind: Any, complaint: str
) -> None:
    rows = np.log(np.array([[0.5, 0.25]] * 3, np.float32))
    top_k = TopK(np.array([[1, 2]] * 3, np.int32), rows, np.full(3, 0.25, np.float32))
    made = [
        make_trace("a", 1),
        make_trace("b", 2),
        make_trace("c", 3, positions=3, top_k=top_k),
    ]
    path = change(write(tmp_path / "f.parquet", made, "bad"), name, change_column, kind)
    code, stdout, stderr = run(
        *("import", path, "--stream", f"bad-{tmp_path.name}", "--service", target, "--progress", "none")
    )
    assert (code, stdout) == (1, "")
    assert str(path) in stderr
    assert complaint in stderr
    assert stderr.count("\n") == 1


def test_what_comes_before_a_wrong_row_is_imported_and_the_rest_after_its_correction(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make_trace(f"q{i}", i) for i in range(6)]
    path = write(tmp_path / "f.parquet", made)
    wrong = change(write(tmp_path / "w.parquet", made), "finish_reason", nth(4, lambda _: "done"))
    code, _, stderr = run("import", wrong, "--stream", "corrected", "--service", target)
    assert code == 1
    assert "the 3 prompts before it are in stream 'corrected'" in stderr
    code, stdout, _ = run("import", path, "--stream", "corrected", "--service", target)
    assert code == 0
    assert "3 traces of 3 prompts imported" in stdout
    assert "skipped 3 prompts" in stdout
    assert_same(read(target, "corrected"), made)


@pytest.mark.parametrize("column", ["prompt_id", "tail_mass"])
def test_a_missing_column_is_named(target: str, tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "f.parquet", make_traces())
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    code, _, stderr = run("import", path, "--stream", "lacking", "--service", target)
    assert code == 1
    assert f"has no column {column}" in stderr
    assert not exists(target, "lacking")


def test_columns_with_defaults_may_be_missing_and_others_are_left_out_aloud(
    tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "f.parquet", [make_trace("q", k=0)])
    optional = ["sample_index", "completion_text", "top_k", "spans", "sampling", "stop_string", "tags"]
    table = pq.read_table(path).drop_columns(optional).append_column("score", pa.array([1.0]))
    pq.write_table(table, path)
    with caplog.at_level("WARNING"):
        assert run("import", path, "--stream", "defaults", "--service", target)[0] == 0
    assert "not imported: column score" in caplog.text
    expected = make_trace("q", k=0, spans=(), sampling=SamplingParams(), tags={}, completion_text="")
    assert_same(read(target, "defaults"), [expected])


def test_sampling_may_say_only_a_part(tmp_path: Path, target: str) -> None:
    path = write(tmp_path / "f.parquet", [make_trace("q", k=0)])
    table = pq.read_table(path).drop_columns(["sampling", "stop_string"])
    sampling = pa.array([{"temperature": 0.25, "stop": ["\n"]}])
    pq.write_table(table.append_column("sampling", sampling), path)
    assert run("import", path, "--stream", "partly", "--service", target)[0] == 0
    (trace,) = read(target, "partly")
    assert trace.sampling == SamplingParams(temperature=0.25, stop=("\n",))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def spoil(data: bytes) -> bytes:
    return data[:200] + bytes(len(data) // 2) + data[200 + len(data) // 2 :]


@pytest.mark.parametrize("ruin", [cut, lambda data: b"", lambda data: b"{}\n" * 50])
def test_what_is_no_whole_parquet_file_is_refused_before_anything_is_made(
    target: str, tmp_path: Path, ruin: Callable[[bytes], bytes]
) -> None:
    path = write(tmp_path / "f.parquet", make_traces())
    path.write_bytes(ruin(path.read_bytes()))
    code, _, stderr = run("import", path, "--stream", "ruined", "--service", target)
    assert code == 1
    assert f"{path} is not a whole Parquet file" in stderr
    assert not exists(target, "ruined")


def test_damage_inside_a_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", [make_trace(f"q{i}", i) for i in range(200)])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InvalidInputError, match="is not a whole Parquet file"):
        read_back(path)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", make_traces())
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"lynearm.parquet_version": b"2"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(UnsupportedFormatError, match="version 2"):
        ParquetTraceSource(path)


def test_a_sealed_stream_takes_nothing_more(target: str, tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [make_trace("q1", 1)])
    assert run("import", first, "--stream", "closed", "--seal", "--service", target)[0] == 0
    second = write(tmp_path / "2.parquet", [make_trace("q2", 2)])
    code, _, stderr = run("import", second, "--stream", "closed", "--service", target)
    assert code == 1
    assert "sealed" in stderr.splitlines()[-1]
    assert len(read(target, "closed")) == 1


def test_an_absent_service_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "1.parquet", [make_trace("q1", 1)])
    for command in (("import", path), ("streams", "export", "s", "--out", tmp_path / "2.parquet")):
        code, _, stderr = run(*command, "--service", "127.0.0.1:1", "--progress", "none")
        assert code == 1
        assert "lynearm serve" in stderr
        assert stderr.count("\n") == 1


@pytest.mark.parametrize("spec", [b"{", b"\xff", b"{}"])
def test_a_spec_that_cannot_be_read_is_an_error(tmp_path: Path, spec: bytes) -> None:
    path = write(tmp_path / "f.parquet", make_traces())
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"lynearm.stream_spec": spec}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(InvalidInputError, match="the stream spec in its metadata cannot be read"):
        ParquetTraceSource(path)


def test_an_absent_file_is_one_line(target: str, tmp_path: Path) -> None:
    code, _, stderr = run("import", tmp_path / "f.parquet", "--service", target)
    assert code == 1
    assert "f.parquet: No such file or directory" in stderr


def test_two_files_become_one_stream_if_they_are_of_one_teacher(target: str, tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [make_trace("q1", 1)])
    second = write(tmp_path / "2.parquet", [make_trace("q2", 2)], "other-name")
    assert run("import", first, second, "--stream", "both", "--service", target)[0] == 0
    assert_same(read(target, "both"), [make_trace("q1", 1), make_trace("q2", 2)])
    spec = dataclasses.replace(make_spec("s"), license="MIT")
    with ParquetTraceWriter(tmp_path / "3.parquet", spec) as writer:
        writer.write([make_trace("q3", 3)])
    code, _, stderr = run("import", first, tmp_path / "3.parquet", "--stream", "three", "--service", target)
    assert code == 2
    assert not exists(target, "three")
    assert "license is 'CC-BY-4.0', wanted 'MIT'" in stderr
    again = write(tmp_path / "4.parquet", [make_trace("q1", 4)])
    code, _, stderr = run("import", first, again, "--stream", "four", "--service", target)
    assert code == 1
    assert "of prompt 'q1', which is also in" in stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("f.bin",), "--format"),
        (("f.parquet", "f.parquet"), "named twice"),
        (("f.parquet", "--format", "csv"), "'csv'"),
        (("f.parquet", "--codec", "best"), "'best'"),
        (("f.parquet", "--top-k", "-1"), "top_k is -1"),
        (("f.parquet", "--stream", "No!"), "'No!'"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(target: str, arguments: tuple[str, ...], complaint: str) -> None:
    code, _, stderr = run("import", *arguments, "--service", target)
    assert code == 2
    assert complaint.replace("top_k is -1", "top_k -1") in stderr


def test_a_killed_import_goes_on_and_imports_nothing_twice(target: str, tmp_path: Path) -> None:
    one = make_trace("q", positions=300, spans=())
    made = [dataclasses.replace(one, prompt_id=f"q{i}") for i in range(500)]
    path = write(tmp_path / "f.parquet", made)
    command = [sys.executable, "-m", "lynearm.cli.main", "import", str(path), "--stream", "killed"]
    process = subprocess.Popen(
        [*command, "--service", target, "--progress", "json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("traces", 0) > 0:
            break
    process.kill()
    process.communicate()
    before = len(read(target, "killed")) if exists(target, "killed") else 0
    assert before < 500
    code, stdout, _ = run("import", path, "--stream", "killed", "--service", target)
    assert code == 0
    assert f"skipped {before} prompts" in stdout or before == 0
    assert_same(read(target, "killed"), made)


def test_ctrl_c_ends_an_import_that_the_same_command_continues(target: str, tmp_path: Path) -> None:
    made = [make_trace(f"q{i}", i, positions=300, spans=()) for i in range(60)]
    path = write(tmp_path / "f.parquet", made)
    config = ImportConfig((path,), stream="interrupted", service=target, seal=True)
    interrupts = iter([interrupt])
    report = import_files(config, lambda progress: next(interrupts, int)() if progress.traces else None)
    assert report.interrupted
    assert not report.sealed
    assert 0 < report.traces < 60
    assert len(read(target, "interrupted")) == report.traces
    report = import_files(config)
    assert (report.traces + report.skipped_traces, report.sealed) == (60, True)
    assert_same(read(target, "interrupted"), made)


def test_ctrl_c_ends_an_export_without_a_file(target: str, exported: Path, tmp_path: Path) -> None:
    interrupts = iter([interrupt])
    path = tmp_path / "f.parquet"
    with TraceClient(target) as client, pytest.raises(KeyboardInterrupt):
        export_parquet(client, "source", path, on_progress=lambda _: next(interrupts, int)())
    assert not list(tmp_path.iterdir())


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_stream_in_standard_mode_is_put_on_a_grid_once_more(target: str, tmp_path: Path) -> None:
    create(target, make_spec("gridded", "standard"), [make_traces()])
    path = tmp_path / "f.parquet"
    assert run("streams", "export", "gridded", "--out", path, "--service", target)[0] == 0
    assert run("import", path, "--stream", "gridded-again", "--service", target)[0] == 0
    for one, other in zip(read(target, "gridded-again"), read(target, "gridded"), strict=True):
        # Blocks choose their grids by their own rows: half a step, at most a quarter of a nat, may be added.
        np.testing.assert_allclose(one.top_k.logprobs, other.top_k.logprobs, atol=0.25)
        np.testing.assert_allclose(one.top_k.tail_mass, other.top_k.tail_mass, rtol=0.25)


def test_without_pyarrow_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"lynearm\[parquet\]"):
        ParquetTraceWriter(tmp_path / "f.parquet", make_spec("s"))


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    writer = ParquetTraceWriter(path, make_spec("s"))
    writer.write(make_traces())
    path.write_text("precious")
    with pytest.raises(ConfigError, match="--overwrite"):
        writer.__exit__(None, None, None)
    assert [one.name for one in tmp_path.iterdir()] == ["f.parquet"]
    assert path.read_text() == "precious"
