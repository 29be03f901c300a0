"""Does a student that learns from its own text come closer to its teacher on that text, for the same tokens?

    python benchmarks/on_policy.py [--tokens 6000] [--layers 20] [--seeds 1]

SmolLM2-135M teaches a student that has some of its layers. First the student is trained off-policy on half of
the teacher tokens. From there, two students go on with the same prompts, steps, batches and rate: one
off-policy with as many tokens that the teacher wrote, one on-policy with as many tokens that it wrote itself
and the teacher scored. Each seed draws its rollouts, and the answers that are measured, anew. All of it runs
as it does elsewhere: a trace service, a served teacher, `lynearm teach` and `lynearm train --on-policy`, each
a process.

What counts is measured with transformers, on held-out prompts: the student answers them at temperature 1, and
at each position of its answer the reverse KL of its distribution to the teacher's is taken over the whole
vocabulary. The forward KL on the teacher's own answers is measured as well. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lynearm.client import TraceClient
from lynearm.demo.config import PROMPTS
from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2
from lynearm.student.cutting.config import CutConfig
from lynearm.student.cutting.cut import cut_student
from lynearm.student.lineage import read_lineage
from lynearm.student.run_directory import resolve_checkpoint
from lynearm.wire.codec import decode_block

_STARTED = time.monotonic()


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one student, nats per token."""

    reverse_kl: float
    """On its own text."""
    forward_kl: float
    """On the teacher's."""


def main() -> None:
    """Train, measure, print, and end with JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", type=Path, help="a model's directory; SmolLM2-135M-Instruct if not given"
    )
    parser.add_argument("--tokens", type=int, default=6000, help="teacher tokens of each half")
    parser.add_argument("--layers", type=int, default=20, help="layers of the student")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--answer-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--batch-tokens", type=int, default=400, help="of a step")
    parser.add_argument("--held-out", type=int, default=16, help="prompts that are measured on")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--support", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each process; 0 for all")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="lynearm-on-policy-") as scratch:
        figures = run(options, Path(scratch))
    print(json.dumps(figures))


def run(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """All of it; the figures of the last line."""
    teacher = options.teacher or prepare_smollm2(default_cache_dir())
    layers = spread_layers(teacher, options.layers)
    student = cut_student(teacher, scratch / "student", CutConfig(keep=tuple(layers))).directory
    say(f"student of {options.layers} layers: {', '.join(map(str, layers))}")
    held_out, *halves = split_prompts(options, scratch)
    with ExitStack() as stack:
        service = start(stack, scratch, "serve", "--data-dir", str(scratch / "traces"), "--port", "0")
        written = [
            teach(options, scratch, service, teacher, half, f"half-{number}")
            for number, half in enumerate(halves)
        ]
        say(f"the teacher wrote {written[0]} and {written[1]} tokens")
        served = start(
            stack, scratch, "teacher", "serve", "--model", str(teacher), "--bind", "127.0.0.1:0",
            "--set", "max_batch=16", "--set", "kv_cache_mib=256",
            "--set", f"threads={options.threads}",
        )  # fmt: skip
        base = train(options, scratch, service, student, "base", "half-0", written[0], 0)
        say("measuring")
        judge = Judge(teacher, held_out, options)
        before = judge.measure(base, 0)
        say(f"after the first half: reverse KL {before.reverse_kl:.4f}, forward KL {before.forward_kl:.4f}")
        results: dict[str, list[Measured]] = {"off_policy": [], "on_policy": []}
        scored: list[int] = []
        for seed in range(options.seeds):
            for way, each in results.items():
                extra = on_policy_options(options, served) if way == "on_policy" else []
                out = train(
                    options, scratch, service, base, f"{way}-{seed}", "half-1", written[1], seed, extra
                )
                each.append(judge.measure(out, seed))
                if way == "on_policy":
                    scored.append(count_rollouts(service, f"half-1.{way}-{seed}.rollouts".replace("_", "-")))
                    trained = read_lineage(out)["runs"][-1]["on_policy"]["completion_tokens"]
                    say(f"  trained on {trained} tokens of its own, {scored[-1]} were scored")
                say(
                    f"{way}, seed {seed}: reverse KL {each[-1].reverse_kl:.4f}, "
                    f"forward KL {each[-1].forward_kl:.4f}"
                )
    return summarise(options, before, results, written[1], scored)


def summarise(
    options: argparse.Namespace,
    before: Measured,
    results: dict[str, list[Measured]],
    written: int,
    scored: Sequence[int],
) -> dict[str, object]:
    """The figures of the last line."""
    figures: dict[str, object] = {
        "seeds": options.seeds,
        "layers": options.layers,
        "teacher_tokens_first_half": options.tokens,
        "teacher_tokens_off_policy": written,
        "teacher_tokens_on_policy": round(statistics.mean(scored)) if scored else 0,
        "reverse_kl_before": round(before.reverse_kl, 4),
        "forward_kl_before": round(before.forward_kl, 4),
    }
    for way, each in results.items():
        figures[f"reverse_kl_{way}"] = round(statistics.mean(one.reverse_kl for one in each), 4)
        figures[f"forward_kl_{way}"] = round(statistics.mean(one.forward_kl for one in each), 4)
    pairs = zip(results["on_policy"], results["off_policy"], strict=True)
    gains = [on.reverse_kl / off.reverse_kl for on, off in pairs]
    figures["reverse_kl_on_vs_off"] = round(statistics.mean(gains), 4)
    figures["on_policy_wins"] = sum(gain < 1 for gain in gains)
    figures["seconds"] = round(time.monotonic() - _STARTED)
    return figures


class Judge:
    """Measures students against the teacher with transformers.

    Args:
        teacher: Directory of the model.
        prompts: File of held-out prompts.
        options: Of the command.
    """

    def __init__(self, teacher: Path, prompts: Path, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(teacher))
        self._teacher = load(teacher)
        self._tokens = options.answer_tokens
        self._ends = self._teacher.generation_config.eos_token_id
        self._prompts: list[torch.Tensor] = []
        for line in prompts.read_text().splitlines():
            turns = [{"role": "user", "content": json.loads(line)["prompt"]}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            self._prompts.append(torch.tensor([tokenizer.encode(text, add_special_tokens=False)]))
        torch.manual_seed(0)
        self._answers = [self._answer(self._teacher, prompt) for prompt in self._prompts]

    def measure(self, student: Path, seed: int) -> Measured:
        """A student's divergences."""
        model = load(student)
        torch.manual_seed(1000 + seed)
        own = [self._answer(model, prompt) for prompt in self._prompts]
        return Measured(
            self._mean(own, lambda ids, start: divergence(model, self._teacher, ids, start)),
            self._mean(self._answers, lambda ids, start: divergence(self._teacher, model, ids, start)),
        )

    def _answer(self, model: Any, prompt: torch.Tensor) -> torch.Tensor:
        return model.generate(
            prompt, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self._tokens,
            pad_token_id=0, attention_mask=torch.ones_like(prompt),
        )  # fmt: skip

    def _mean(self, texts: Sequence[torch.Tensor], kl_of: Any) -> float:
        parts = [kl_of(ids, prompt.shape[1]) for ids, prompt in zip(texts, self._prompts, strict=True)]
        return float(torch.cat(parts).mean())


def divergence(first: Any, second: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    """KL of the first model's distributions to the second's, over the vocabulary, at each position."""
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(model(ids).logits[0, start - 1 : -1].float(), -1) for model in (first, second)
        )
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def load(directory: Path) -> Any:
    """A model as transformers has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()


def spread_layers(teacher: Path, count: int) -> list[int]:
    """Layers to keep: the first, the last, and others evenly between."""
    available = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
    return sorted({round(index * (available - 1) / max(1, count - 1)) for index in range(count)})


def split_prompts(options: argparse.Namespace, scratch: Path) -> list[Path]:
    """Files of held-out prompts and of both halves, which share the topics."""
    rows = [json.loads(line) for line in options.prompts.read_text().splitlines() if line.strip()]
    kept = [row for row in rows if row.get("tags", {}).get("split") == "held_out"][: options.held_out]
    rest = [row for row in rows if row not in kept and row.get("tags", {}).get("split") != "held_out"]
    kept = kept or rest[: options.held_out]
    parts = {"held-out": kept, "half-0": rest[0::2], "half-1": rest[1::2]}
    files: list[Path] = []
    for name, part in parts.items():
        files.append(scratch / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in part))
    return files


def teach(
    options: argparse.Namespace, scratch: Path, service: str, teacher: Path, prompts: Path, stream: str
) -> int:
    """Let the teacher write a half of its tokens; how many came of it."""
    count = len(prompts.read_text().splitlines())
    # Answers are a half to two thirds as long as they may be.
    completions = max(1, math.ceil(options.tokens / (count * options.answer_tokens * 0.55)))
    limit = math.ceil(options.tokens / (completions * options.answer_tokens * 0.55))
    call(
        scratch, f"teach-{stream}", "teach", "--model", str(teacher), "--prompts", str(prompts),
        "--stream", stream, "--service", service, "--license", "Apache-2.0", "--temperature", "1",
        "--max-tokens", str(options.answer_tokens), "--completions", str(completions), "--limit", str(limit),
        "--set", "max_model_len=512", "--set", "codec=fine", "--set", f"threads={options.threads}",
    )  # fmt: skip
    with TraceClient(service) as client:
        return client.get_stream(stream).completion_token_count


def train(
    options: argparse.Namespace,
    scratch: Path,
    service: str,
    student: Path,
    name: str,
    stream: str,
    tokens: int,
    seed: int,
    extra: Sequence[str] = (),
) -> Path:
    """Train on a number of tokens; the checkpoint."""
    steps = max(1, tokens // options.batch_tokens)
    out = scratch / name.replace("_", "-")
    loss = ["--loss", "forward-kl:1"]
    call(
        scratch, name, "train", "--student", str(student), "--stream", stream, "--service", service,
        "--out", str(out), "--seed", str(seed), "--max-steps", str(steps), "--held-out-traces", "0",
        "--threads", str(options.threads), "--eval-every-steps", "0", "--checkpoint-every-steps", "0",
        "--learning-rate", str(options.learning_rate), "--set", "held_out_fraction=0", "--set",
        f"batch_tokens={options.batch_tokens}", "--set", f"warmup_steps={min(10, steps // 4)}",
        "--epochs", "2", *loss, *extra,
    )  # fmt: skip
    say(f"{name}: {steps} steps")
    return resolve_checkpoint(out)


def on_policy_options(options: argparse.Namespace, served: str) -> list[str]:
    """What makes a run on-policy, and nothing else."""
    return [
        "--on-policy", "--teacher", served, "--on-policy-share", "1", "--max-staleness", "4",
        "--set", "refresh_every_steps=2", "--set", f"rollout_tokens={options.answer_tokens}",
        "--set", f"rollout_support={options.support}", "--set", "rollout_kv_cache_mib=256",
        "--set", f"rollout_threads={options.threads}",
    ]  # fmt: skip


def count_rollouts(service: str, stream: str) -> int:
    """Tokens that the teacher has scored."""
    with TraceClient(service) as client, client.subscribe(stream, follow=False) as blocks:
        traces = [trace for one in blocks for trace in decode_block(one.block)]
    return sum(trace.completion_token_ids.size for trace in traces)


def start(stack: ExitStack, scratch: Path, *arguments: str) -> str:
    """Start a role that serves; its address."""
    path = scratch / f"{arguments[0]}.out"
    log = stack.enter_context(path.open("wb"))
    process = subprocess.Popen(
        [sys.executable, "-m", "lynearm.cli.main", *arguments, "--progress", "json"], stdout=log, stderr=log
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    while process.poll() is None:
        found = re.search(r"(\d+\.\d+\.\d+\.\d+:[1-9]\d+)", path.read_text())
        if found is not None:
            return found[1]
        time.sleep(0.2)
    raise SystemExit(f"{arguments[0]} ended: {path.read_text()[-2000:]}")


def call(scratch: Path, name: str, *arguments: str) -> None:
    """Run a role to its end."""
    path = scratch / f"{name}.log"
    with path.open("wb") as log:
        ended = subprocess.run(
            [sys.executable, "-m", "lynearm.cli.main", *arguments, "--progress", "plain"],
            stdout=log, stderr=log, check=False,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}: {path.read_text()[-3000:]}")


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.monotonic() - _STARTED:6.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
