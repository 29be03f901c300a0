"""The demo's prompts: well formed, balanced, and with a held-out part that the rest does not give away."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

TOPICS = {"arithmetic", "facts", "rewriting", "code"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    text = files("lynearm.demo").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", row["prompt"].lower()))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def test_every_line_is_a_prompt_with_id_topic_and_split(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == {"id", "prompt", "tags"}
        assert set(row["tags"]) == {"topic", "split"}
        assert row["tags"]["topic"] in TOPICS
        assert row["tags"]["split"] in {"held_out", "train"}
        assert re.fullmatch(r"(arith|fact|rewrite|code)-\d{3}", row["id"])
        assert row["prompt"] == row["prompt"].strip()
        assert 10 <= len(row["prompt"]) <= 200


def test_ids_and_prompts_are_unique(rows: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["prompt"].lower() for row in rows}) == len(rows)


def test_topics_are_balanced_in_both_splits(rows: list[dict[str, Any]]) -> None:
    counts = Counter((row["tags"]["split"], row["tags"]["topic"]) for row in rows)
    assert 290 <= len(rows) <= 310
    for topic in TOPICS:
        assert 7 <= counts["held_out", topic] <= 8
        assert 64 <= counts["train", topic] <= 72


def test_held_out_prompts_come_first(rows: list[dict[str, Any]]) -> None:
    splits = [row["tags"]["split"] for row in rows]
    held_out = splits.count("held_out")
    assert 28 <= held_out <= 32
    assert splits == ["held_out"] * held_out + ["train"] * (len(rows) - held_out)


def test_any_stretch_of_training_prompts_mixes_the_topics(rows: list[dict[str, Any]]) -> None:
    topics = [row["tags"]["topic"] for row in rows if row["tags"]["split"] == "train"]
    for start in range(len(topics) - 7):
        assert set(topics[start : start + 8]) == TOPICS


def test_no_training_prompt_resembles_a_held_out_one(rows: list[dict[str, Any]]) -> None:
    held_out = [row for row in rows if row["tags"]["split"] == "held_out"]
    train = [row for row in rows if row["tags"]["split"] == "train"]
    for kept, seen in itertools.product(held_out, train):
        assert overlap(words(kept), words(seen)) < 0.6, (kept["prompt"], seen["prompt"])


def test_no_two_prompts_are_nearly_the_same(rows: list[dict[str, Any]]) -> None:
    for a, b in itertools.combinations(rows, 2):
        assert overlap(words(a), words(b)) < 0.7, (a["prompt"], b["prompt"])


def test_no_opening_is_used_over_and_over(rows: list[dict[str, Any]]) -> None:
    openings = Counter(" ".join(row["prompt"].lower().split()[:4]) for row in rows)
    opening, count = openings.most_common(1)[0]
    assert count <= 8, opening
