"""docs/interchange.md says what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from interchange.material import make_spec, make_traces

from lynearm.interchange.arrow import PARQUET_VERSION, SPEC_METADATA_KEY, VERSION_METADATA_KEY, trace_schema
from lynearm.interchange.parquet_writer import ParquetTraceWriter

TEXT = (Path(__file__).parents[2] / "docs" / "interchange.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_column_is_listed_in_order_with_its_type() -> None:
    listed = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", TEXT, re.MULTILINE)
    columns = [(name, kind.replace("\\", "")) for name, kind in listed][: len(trace_schema(pyarrow))]
    for (name, kind), field in zip(columns, trace_schema(pyarrow), strict=True):
        plain = re.sub("item: |element: ", "", str(field.type))
        said = re.sub(r"struct<(?:[^<>]|<[^<>]*>)*>", "struct", plain)
        assert (name, kind) == (field.name, said)


def test_the_metadata_is_what_it_says() -> None:
    assert f"`{SPEC_METADATA_KEY.decode()}`" in TEXT
    assert f"`{VERSION_METADATA_KEY.decode()}`: {PARQUET_VERSION}" in TEXT


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["pandas", "polars", "datasets"])
def test_the_examples_run(snippet: str, tmp_path: Path) -> None:
    with ParquetTraceWriter(tmp_path / "math.parquet", make_spec("math")) as writer:
        writer.write(make_traces())
    environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_request_is_json() -> None:
    (request,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert json.loads(request)["return_tokens_as_token_ids"] is True
