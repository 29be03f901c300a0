"""Runs the Core ML package beside this file on a Mac and compares it with stored logits.

    pip install coremltools numpy
    python verify_on_mac.py [--compute-units CPU_AND_GPU]

Feeds a prompt at once, then single tokens through the key-value cache, then lets the package continue the
prompt greedily. Exits with 1 if the mean KL to torch in float32, of the same weights, is above the limit.
This file needs nothing but numpy and coremltools, so that it can travel with the package.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

REFERENCE_FILE = "reference.npz"
KL_LIMIT = 5e-3
"""Mean nats per position; float16 rounding alone gives about 4e-5."""
BLOCKED = -65504.0
"""The lowest float16: added to the score of a token that may not be seen."""

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Predict: TypeAlias = Callable[[dict[str, Array]], Mapping[str, Array]]
"""One call of the model within one conversation."""


@dataclass(frozen=True)
class Findings:
    """What one check found."""

    kl_mean: float
    """Nats."""
    max_abs_logit_error: float
    greedy_matched: int
    greedy_total: int
    seconds_per_token: float

    @property
    def passed(self) -> bool:
        """Whether the package computes what its weights say."""
        return self.kl_mean <= KL_LIMIT


def check(start: Callable[[], Predict], reference: Mapping[str, Array]) -> Findings:
    """Compares a package with the reference.

    Args:
        start: Begins a conversation with empty caches.
        reference: Arrays `token_ids`, `prompt_length`, `logits` [T, V] and `greedy`.
    """
    token_ids, prompt_length = reference["token_ids"].tolist(), int(reference["prompt_length"])
    prompt, given = token_ids[:prompt_length], token_ids[prompt_length:]
    predict = start()
    rows = [_feed(predict, prompt, 0)]
    began = time.perf_counter()
    for position, token in enumerate(given, start=prompt_length):
        rows.append(_feed(predict, [token], position))
    seconds = (time.perf_counter() - began) / max(1, len(given))
    found_TV, expected_TV = np.stack(rows), reference["logits"].astype(np.float64)
    continued = _continue(start(), prompt, len(reference["greedy"]))
    same = [a == b for a, b in zip(continued, reference["greedy"].tolist(), strict=True)]
    return Findings(
        kl_mean=float(_kl(expected_TV, found_TV).mean()),
        max_abs_logit_error=float(np.abs(expected_TV - found_TV).max()),
        greedy_matched=same.index(False) if False in same else len(same),
        greedy_total=len(same),
        seconds_per_token=seconds,
    )


def main() -> int:
    """Checks the package beside this file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Compare the Core ML package beside this file with its reference."
    )
    parser.add_argument(
        "--compute-units", default="CPU_AND_GPU", help="CPU_ONLY, CPU_AND_GPU, CPU_AND_NE or ALL"
    )
    units = parser.parse_args().compute_units
    here = Path(__file__).resolve().parent
    packages = sorted(here.glob("*.mlpackage"))
    if sys.platform != "darwin" or len(packages) != 1:
        print("This needs macOS 15 or later, and one .mlpackage beside it.", file=sys.stderr)
        return 2
    with np.load(here / REFERENCE_FILE) as stored:
        reference = {name: stored[name] for name in stored.files}
    findings = check(_load(packages[0], units), reference)
    print(f"{packages[0].name} on {units}: {findings}")
    print("passed" if findings.passed else f"FAILED: mean KL must not exceed {KL_LIMIT}")
    return 0 if findings.passed else 1


def _load(package: Path, units: str) -> Callable[[], Predict]:
    # Any: coremltools ships no types.
    library: Any = importlib.import_module("coremltools")
    model = library.models.MLModel(str(package), compute_units=library.ComputeUnit[units])

    def start() -> Predict:
        state = model.make_state()
        return lambda inputs: model.predict(inputs, state)

    return start


def _feed(predict: Predict, token_ids: list[int], position: int) -> Array:
    """Logits after the last of some tokens that stand at `position` and later, float64, shape [V]."""
    rows, columns = len(token_ids), position + len(token_ids)
    mask = np.triu(np.full((rows, columns), BLOCKED, np.float16), k=position + 1)
    inputs: dict[str, Array] = {
        "inputIds": np.array([token_ids], np.int32),
        "fullAttentionMask": mask[None, None],
    }
    logits: Array = np.asarray(predict(inputs)["logits"], np.float64)
    return np.asarray(logits[0, -1])


def _continue(predict: Predict, prompt: list[int], count: int) -> list[int]:
    found = [int(_feed(predict, prompt, 0).argmax())]
    while len(found) < count:
        found.append(int(_feed(predict, found[-1:], len(prompt) + len(found) - 1).argmax()))
    return found[:count]


def _kl(expected_TV: Array, found_TV: Array) -> Array:
    expected, found = _log_softmax(expected_TV), _log_softmax(found_TV)
    return np.asarray((np.exp(expected) * (expected - found)).sum(-1))


def _log_softmax(logits_TV: Array) -> Array:
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


if __name__ == "__main__":
    sys.exit(main())
