"""docs/reasoning.md: its settings are settings, its job file is one, its code runs."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lynearm.cli.settings import load_settings
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.job_file import parse_job_file
from lynearm.teacher.maths_answers import find_answer, number_of
from lynearm.teacher.prompts import parse_prompt
from lynearm.teacher.selection import record_trace, verifier_of

PAGE = (Path(__file__).parents[2] / "docs" / "reasoning.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_settings_are_settings() -> None:
    settings, _ = map(tomllib.loads, blocks("toml"))
    config = load_settings(TeachConfig, "teach", tables=[("docs", settings["teach"])])
    assert config.keep == "shortest-correct"
    assert verifier_of(config) is not None


def test_the_job_file_makes_configurations() -> None:
    job = parse_job_file(blocks("toml")[1], name="lessons.toml")
    configs = [load_settings(TeachConfig, "teach", tables=job.settings_of(one)) for one in job.teachers]
    assert [(config.model, config.verify, config.max_tokens) for config in configs] == [
        ("models/maths", "maths", 512),
        ("models/code", "", 512),
        ("models/general", "", 512),
    ]
    assert [job.table.teachers_for({"topic": topic}) for topic in ("physics", "code", "art")] == [
        ("maths",),
        ("code",),
        ("general",),
    ]


def test_the_prompt_is_one_and_its_reference_a_number() -> None:
    (line,) = blocks("json")
    prompt = parse_prompt(json.dumps(json.loads(line)).encode())
    assert find_answer(prompt.tags["answer"]) == "72"


@pytest.mark.parametrize(
    "written", ["1,234.50", "3/4", "1 1/2", r"\frac{1}{2}", r"6\times 10^{3}", "$5", "50%"]
)
def test_the_numbers_are_read(written: str) -> None:
    assert f"`{written}`" in PAGE
    assert number_of(written) is not None


def test_the_function_judges() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    check: Callable[[str, object], bool] = names["is_short_list"]
    trace = record_trace("p", {"most": "2"})
    assert [check(answer, trace) for answer in ("- a\n- b", "- a\n- b\n- c", "a")] == [True, False, False]
    assert trace.completion_token_ids.dtype == np.int32
