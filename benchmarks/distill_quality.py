"""What students learn from each codec, beside the teacher's whole distributions and beside hard labels.

    python benchmarks/distill_quality.py [--quick]

The teacher is SmolLM2-135M, the student 20 of its 30 layers as `lynearm student cut` chooses them. The
teacher writes completions at temperature 1; they go through the codec's blocks, dictionary included, and
train one student for each method and seed through `lynearm.student`, all methods of a seed on the same
traces in the same order. A seed draws its traces and their order from the pool. Measured is the KL to the
teacher's whole distribution on prompts that nobody trained on, by transformers in float32.

- `dense`: forward KL to the teacher's whole distribution, computed anew at each step. The ceiling.
- `standard_k64`, `standard_adaptive`, `compact_adaptive`: forward KL over the kept entries and the tail's
  mass, with k = 64 or adaptive k (probability of at least 1e-3, at most 64).
- `sampled`: 50 draws and their counts, `sampled-kd`.
- `hard_labels`: cross-entropy on the teacher's tokens.
- `k64_default_loss`: as `standard_k64`, with 0.1 cross-entropy: what `lynearm train` does unless told.
- `k64_tail_draw`, `k64_4_tail_draws`, `adaptive_tail_draw`: with one token, or four, drawn from the tail of
  each row (`lynearm teach --tail-draws 1`), which stand for its mass in `tail-cross-entropy`.
- `k64_tail_token`: with `tail-cross-entropy` at weight 0.3, in which the token that the teacher wrote stands
  for the tail where it fell into it.

Results are kept in --out as they come: run it again with the same settings, and it goes on. Takes an hour
to an hour and a half on 2 free cores, of which the 11 methods have some 3 minutes each, and dense 7. By
default the pool is as large as what a seed needs: seeds share the traces, and differ in their order. --quick
takes half a minute with a small teacher (--teacher), and shows that it runs and no more. Questions are those
of GSM8K and self-instruct in --data, or else the demo's. Needs the extras `student`, `teacher` and `demo`.

The last line is JSON. For each METHOD but `dense`: `METHOD_vs_dense`, its held-out KL over that of dense,
mean over seeds, and `METHOD_vs_dense_spread`, the standard deviation. For each METHOD: `METHOD_kl`, nats per
token, and `METHOD_bits`, bits per token (of `dense`: 16 for each token of the vocabulary). `initial_kl` is
that of the student before training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_quality_report import DENSE, Result, report

if TYPE_CHECKING:
    from distill_quality_runs import Method, Quality
    from distill_quality_traces import Coded, Corpus

_ROOT = Path(__file__).resolve().parents[1]
_DATA = _ROOT.parent / "shared" / "data"
_OUT = _ROOT / "runs" / "distill_quality"

LONGEST_PROMPT = 72
"""Tokens: longer ones cost time, and no student is trained on them."""

LEAST_PROBABILITY = 1e-3
"""Of an entry, with adaptive k."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a result depends on: results of others are not taken for it."""

    teacher: str
    layers: int
    prompts: str
    pool: int
    held_out: int
    length: int
    steps: int
    sequences: int
    learning_rate: float
    dtype: str


def main() -> int:
    options = parse_options()
    from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    teacher_dir: Path = options.teacher or prepare_smollm2(default_cache_dir())
    settings = Settings(
        teacher_dir.name,
        options.layers,
        "demo" if not (options.data / "gsm8k_train.jsonl").is_file() else "gsm8k, self-instruct",
        options.pool or 2 * options.steps * options.sequences,
        options.held_out,
        options.length,
        options.steps,
        options.sequences,
        options.learning_rate,
        options.dtype,
    )
    if settings.pool < settings.steps * settings.sequences:
        print(f"--pool {settings.pool} is less than a seed's {settings.steps} × {settings.sequences} traces")
        return 2
    import torch

    torch.set_num_threads(options.threads)
    bench = Bench(settings, teacher_dir, options.data, options.out, options.methods)
    results = bench.run(options.seeds)
    report(bench, results)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--teacher", type=Path, help="directory of another teacher than SmolLM2")
    parser.add_argument("--layers", type=int, default=20, help="of the teacher's, that the student keeps")
    parser.add_argument("--data", type=Path, default=_DATA, help="directory with the questions")
    parser.add_argument("--out", type=Path, default=_OUT, help="keeps traces, student and results")
    parser.add_argument("--methods", nargs="*", default=(), help="train these alone; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sequences", type=int, default=8, help="traces of a step")
    parser.add_argument("--pool", type=int, default=192, help="traces to draw from; 0: twice those of a seed")
    parser.add_argument("--held-out", type=int, default=16, help="traces to measure on")
    parser.add_argument("--length", type=int, default=96, help="tokens of a completion, at most")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of training")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.sequences = 2, 2, 2
        options.held_out, options.length = 2, 8
    return options


def make_methods() -> tuple[Method, ...]:
    from distill_quality_runs import Method
    from distill_quality_traces import DRAWS, TOP_K

    from lynearm.student.objective import DEFAULT_LOSS
    from lynearm.wire.specs import CodecSpec

    adaptive = {"top_k": TOP_K, "min_probability": LEAST_PROBABILITY}
    kl, drawn = ("forward-kl",), CodecSpec("sampled", DRAWS, draws=DRAWS)
    tail, tail_token = (*kl, "tail-cross-entropy"), (*kl, "tail-cross-entropy:0.3")
    one_draw, four_draws = (CodecSpec("standard", TOP_K, tail_draws=draws) for draws in (1, 4))
    adaptive_draw = CodecSpec("standard", **adaptive, tail_draws=1)
    return (
        Method(DENSE, "dense", kl, None),
        Method("standard_k64", "standard, k = 64", kl, CodecSpec("standard", TOP_K)),
        Method("standard_adaptive", "standard, adaptive", kl, CodecSpec("standard", **adaptive)),
        Method("compact_adaptive", "compact, adaptive", kl, CodecSpec("compact", **adaptive)),
        Method("sampled", "sampled, 50 draws", ("sampled-kd",), drawn, "draws"),
        Method("hard_labels", "hard labels", ("cross-entropy",), CodecSpec("standard", 0), "none"),
        Method("k64_default_loss", "k = 64, 0.1 hard labels", DEFAULT_LOSS, CodecSpec("standard", TOP_K)),
        Method("k64_tail_draw", "k = 64, a tail draw", tail, one_draw, "tail draws"),
        Method("k64_4_tail_draws", "k = 64, 4 tail draws", tail, four_draws, "tail draws"),
        Method("adaptive_tail_draw", "adaptive, a tail draw", tail, adaptive_draw, "tail draws"),
        Method("k64_tail_token", "k = 64, tail token, 0.3", tail_token, CodecSpec("standard", TOP_K)),
    )


class Bench:
    """All that is prepared once: teacher, student, traces as each method's stream carries them."""

    def __init__(
        self, settings: Settings, teacher_dir: Path, data: Path, out: Path, names: Sequence[str] = ()
    ) -> None:
        from distill_quality_runs import HeldOut

        from lynearm.student.model import load_causal_lm

        self.settings = settings
        self.out = out
        self.methods = [method for method in make_methods() if not names or method.name in names]
        self._teacher = load_causal_lm(teacher_dir).eval()
        self._student_dir = self._cut(teacher_dir)
        corpus = self._traces(teacher_dir, data)
        self.held_out = HeldOut(self._teacher, corpus.top_k[: settings.held_out])
        self.streams = {
            method.name: coded
            for method in self.methods
            if (coded := self._stream(method, corpus)) is not None
        }
        self._traces_of_dense = corpus.top_k[settings.held_out :]
        self._results_path = out / "results.jsonl"

    def run(self, seeds: int) -> list[Result]:
        """Every student that is not there yet, seed after seed; all results."""
        results = self._read()
        done = {(result.seed, result.method) for result in results}
        for seed in range(seeds):
            for method in self.methods:
                if (seed, method.name) not in done:
                    results.append(self._train(seed, method))
                    self._write(results[-1])
        return [result for result in results if result.seed < seeds]

    def dense_bits(self) -> float:
        return 16.0 * int(self._teacher.config.vocab_size)

    def _cut(self, teacher_dir: Path) -> Path:
        from lynearm.student.cutting.config import CutConfig
        from lynearm.student.cutting.cut import cut_student

        directory = self.out / f"{teacher_dir.name}-{self.settings.layers}-layers"
        if not directory.is_dir():
            say(f"student: choosing {self.settings.layers} layers")
            cut_student(teacher_dir, directory, CutConfig(layers=self.settings.layers))
        return directory

    def _traces(self, teacher_dir: Path, data: Path) -> Corpus:
        from distill_quality_traces import (
            choose_prompts,
            encode_prompts,
            load_corpus,
            read_questions,
            save_corpus,
            write_completions,
        )
        from transformers import AutoTokenizer

        from lynearm.student.model import read_tokenizer_spec

        settings = self.settings
        source = "demo" if settings.prompts == "demo" else "questions"
        name = f"{teacher_dir.name}-{source}-{settings.held_out}-{settings.pool}-{settings.length}"
        directory = self.out / name
        if not directory.is_dir():
            tokenizer: Any = AutoTokenizer.from_pretrained(teacher_dir)
            prompts = encode_prompts(read_questions(data), tokenizer, longest=LONGEST_PROMPT)
            asked = choose_prompts(prompts, held_out=settings.held_out, trained=settings.pool)
            ends = read_tokenizer_spec(teacher_dir).eos_token_ids
            corpus = write_completions(self._teacher, asked, ends=ends, length=settings.length)
            save_corpus(corpus, directory, self._teacher.config.vocab_size)
        return load_corpus(directory)

    def _stream(self, method: Method, corpus: Corpus) -> Coded | None:
        from distill_quality_traces import make_rows, pass_through_codec

        if method.codec is None:
            return None
        trained = corpus.from_trace(self.settings.held_out)
        traces = make_rows(trained, method.rows, method.codec.tail_draws, teacher=self._teacher)
        return pass_through_codec(traces, method.codec, self._teacher.config.vocab_size)

    def _train(self, seed: int, method: Method) -> Result:
        import numpy as np
        from distill_quality_runs import Training, train

        settings = self.settings
        stream = self.streams.get(method.name)
        traces = stream.traces if stream else self._traces_of_dense
        order = np.random.default_rng(seed).permutation(len(traces))
        chosen = order[: settings.steps * settings.sequences].tolist()
        started, cpu_started = time.monotonic(), time.process_time()
        quality = train(
            self._student_dir,
            method,
            [traces[number] for number in chosen],
            Training(settings.steps, settings.sequences, settings.learning_rate, settings.dtype),
            teacher=self._teacher,
            measure_at=(max(1, settings.steps // 2), settings.steps),
            measure=self.held_out.measure,
        )
        result = Result(seed, method.name, quality)
        say(
            f"seed {seed}, {method.title}: KL {result.final.kl:.4f} after {settings.steps} steps, "
            f"{time.process_time() - cpu_started:.0f} CPU-s in {time.monotonic() - started:.0f} s"
        )
        return result

    def measure_initial(self) -> Quality:
        """The student before any training."""
        from lynearm.student.model import load_causal_lm

        return self.held_out.measure(load_causal_lm(self._student_dir))

    def _read(self) -> list[Result]:
        """Results of the same settings; several processes may have added to them."""
        from distill_quality_runs import Quality

        if not self._results_path.is_file():
            return []
        lines = [json.loads(line) for line in self._results_path.read_text(encoding="utf-8").splitlines()]
        found = {
            (line["seed"], line["method"]): Result(
                line["seed"],
                line["method"],
                {int(step): Quality(**quality) for step, quality in line["quality"].items()},
            )
            for line in lines
            if line["settings"] == dataclasses.asdict(self.settings)
        }
        return list(found.values())

    def _write(self, result: Result) -> None:
        line = {"settings": dataclasses.asdict(self.settings), **dataclasses.asdict(result)}
        with self._results_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
