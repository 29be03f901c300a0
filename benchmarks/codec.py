"""Bits per generated token, added KL and speed of the codec, next to what others spend on the same rows.

    python benchmarks/codec.py [--corpus FILE] [--quick]

Dictionaries are trained on 60 % of the completions; bits and KL are measured on the others. Everything that
a trainer needs is in the bits: sampled token and logprob, kept tokens and logprobs, tail mass, and header,
checksum and metadata of each block. Prompts are left out, since their share depends on the job. Rows are
decoded before they are compared, and a block whose tokens, or in exact mode bits, come back changed ends the
run. Speed is that of one core, in CPU time, over the whole corpus: quote it from a quiet machine. As in any
process with a client of the service, freed memory is kept (`lynearm.wire.allocation`); where it is not, pages
that the system clears anew take a quarter of a decoder's time. The last line is one JSON object.

Takes about a minute, with --quick about 10 s. Without --corpus, the rows of SmolLM2-135M in ../shared/data
are used where they are, and a made-up teacher's elsewhere. `codec_corpus.py` describes the file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from codec_baselines import QUOTED_BITS, measure_baselines
from codec_corpus import (
    Corpus,
    build_traces,
    count_tokens,
    cut_trace,
    draw_traces,
    group_traces,
    load_corpus,
    make_corpus,
    on_bf16_grid,
    split_corpus,
)
from codec_measure import Blocks, Coder, Distances, Rows, Speed, decode_checked, measure_speed, rows_bytes
from codec_tables import print_table

from lynearm.wire.allocation import keep_freed_memory
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

_DEFAULT_CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "teacher_topk256.npz"
_SMALL, _BULK = 256, 4096
"""Positions a block, of whole completions."""

_PIECE = 16
_DRAWS = 50
_SYNTHETIC_POSITIONS = 8_192
_QUICK_POSITIONS = 2_048

_HEAD = (
    "",
    f"bits/token\nat {_SMALL}",
    f"\nat {_BULK:,}",
    f"{_SMALL}, no\ndict.",
    "dict.\nbytes",
    "pays\nafter",
    "added KL\nmean",
    "\np99.9",
    "mass\nkept",
    "encode\nM/s",
    "decode\nM/s",
    "block\nKB",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A way to encode one corpus."""

    name: str
    spec: CodecSpec
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a case costs, at blocks of `_SMALL` positions where nothing else is said."""

    bits: float
    bulk_bits: float
    """At blocks of `_BULK`."""
    bare_bits: float
    """Without a dictionary."""
    dictionary_bytes: int
    given: Rows
    """After adaptive k."""
    returned: Rows
    distances: Distances
    speed: Speed


@dataclass(frozen=True, slots=True)
class PieceCost:
    """Bits per token of the same pieces in small and in large blocks, and those of them that are no rows."""

    small: float
    small_frame: float
    large: float
    large_frame: float

    @property
    def overhead(self) -> float:
        return self.small / self.large - 1

    @property
    def frame_share(self) -> float:
        """What framing, headers and metadata add to the overhead."""
        return (self.small_frame - self.large_frame) / self.large


@dataclass(frozen=True, slots=True)
class Goal:
    what: str
    measured: str
    bound: str
    holds: bool

    @staticmethod
    def at_most(what: str, value: float, bound: float, form: str = ",.1f") -> Goal:
        return Goal(what, format(value, form), f"≤ {bound:{form}}", value <= bound)

    @staticmethod
    def at_least(what: str, value: float, bound: float) -> Goal:
        return Goal(what, f"{value / 1e6:.2f} M", f"≥ {bound / 1e6:.2f} M", value >= bound)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="an .npz of rows")
    parser.add_argument("--synthetic", action="store_true", help="a made-up teacher in any case")
    parser.add_argument("--quick", action="store_true", help="only what the targets need")
    arguments = parser.parse_args()
    if arguments.corpus is not None and not arguments.corpus.is_file():
        print(f"no corpus at {arguments.corpus}: name one with --corpus, or leave it out", file=sys.stderr)
        return 2
    use_one_core()
    keep_freed_memory()
    corpus = choose_corpus(arguments.corpus, synthetic=arguments.synthetic, quick=arguments.quick)
    bench = Bench(corpus, runs=5 if arguments.quick else 9)
    print_opening(bench)
    results: dict[str, Result] = {}
    for k in (16, 64) if arguments.quick else (16, 64, 128):
        results |= report_k(bench, k, quick=arguments.quick)
    if not arguments.quick:
        report_draws(bench)
    piece_overhead = report_pieces(bench)
    figures = summarise(results, piece_overhead)
    report_goals(results, figures)
    print()
    print(json.dumps({name: float(f"{value:.5g}") for name, value in figures.items()}))
    return 0


def use_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def choose_corpus(path: Path | None, *, synthetic: bool, quick: bool) -> Corpus:
    if path is not None:
        return load_corpus(path)
    if _DEFAULT_CORPUS.is_file() and not synthetic:
        return load_corpus(_DEFAULT_CORPUS)
    return make_corpus(_QUICK_POSITIONS if quick else _SYNTHETIC_POSITIONS)


class Bench:
    """A corpus, as it is and on the bf16 grid, split into what dictionaries see and what is measured."""

    def __init__(self, corpus: Corpus, *, runs: int) -> None:
        self.corpus = corpus
        self.runs = runs
        self._whole = {False: corpus, True: on_bf16_grid(corpus)}
        self._split = {bf16: split_corpus(whole) for bf16, whole in self._whole.items()}

    @property
    def vocab_size(self) -> int:
        return self.corpus.vocab_size

    def rows(self, part: str, *, bf16: bool = False) -> Corpus:
        """The rows of one part: "train", "test" or "whole"."""
        train, test = self._split[bf16]
        return {"train": train, "test": test, "whole": self._whole[bf16]}[part]

    def traces(self, part: str, k: int, *, tail_draws: int = 0, bf16: bool = False) -> list[Trace]:
        return build_traces(self.rows(part, bf16=bf16), k, tail_draws)

    def measure(self, case: Case) -> Result:
        spec = case.spec
        train, test, whole = (
            self.traces(part, spec.top_k, tail_draws=spec.tail_draws, bf16=case.bf16)
            for part in ("train", "test", "whole")
        )
        return self.measure_traces(case.spec, train, test, whole)

    def measure_traces(
        self, spec: CodecSpec, train: list[Trace], test: list[Trace], whole: list[Trace]
    ) -> Result:
        """Bits and distances on `test`, speed on `whole`, with dictionaries from `train`."""
        blocks, bulk_blocks = group_traces(test, _SMALL), group_traces(test, _BULK)
        coder = Coder.train(group_traces(train, _SMALL), spec, self.vocab_size)
        bulk_coder = Coder.train(group_traces(train, _BULK), spec, self.vocab_size)
        encoded = coder.encode(blocks)
        given, returned = decode_checked(encoded, blocks, coder)
        bulk_bits = bulk_coder.bits_per_token(bulk_blocks)
        return Result(
            bits=sum(map(len, encoded)) * 8 / count_tokens(test),
            bulk_bits=bulk_bits,
            bare_bits=coder.without_dictionary().bits_per_token(blocks),
            dictionary_bytes=coder.dictionary_bytes,
            given=given,
            returned=returned,
            distances=Distances.between(given, returned),
            speed=measure_speed(whole, bulk_coder, bulk_bits, self.runs),
        )


def print_opening(bench: Bench) -> None:
    corpus, synthetic = bench.corpus, bench.corpus.name == "synthetic"
    print(f"corpus: {'SYNTHETIC, no model wrote it' if synthetic else corpus.name}; ", end="")
    print(f"{corpus.positions:,} positions over {corpus.vocab_size:,} tokens; ", end="")
    print(f"{bench.rows('train').positions:,} to train on, {bench.rows('test').positions:,} to measure on")
    print(
        f"""
  at {_SMALL}, at {_BULK:,}  whole completions until a block has so many positions, with a dictionary
  dict. bytes      sent once a stream; after so many tokens as "pays after" it has paid for itself
  added KL         nats, over kept entries and tail, of what came back from what was given
  mass kept        what the entries hold before any encoding; the rest is one number, the tail mass
  encode, decode   millions of tokens a CPU second, one core: from vLLM's arrays to blocks of the size
                   beside, and from such blocks to the arrays that a trainer batches
  tail draw        a token drawn from what is not kept, here from the next likeliest that the corpus has
  p ≥ …            adaptive: the entries above a probability, at most k; in brackets, how many on average
  quoted           measured elsewhere on SmolLM2's rows, not in this run: chat JSON with words for tokens,
                   which this run writes as "token_id:N" like vLLM's return_tokens_as_token_ids, and
                   DistillKit's formats, which lack sampled token and tail (with normalize_t: KL 1.3e-4)"""
    )


def report_k(bench: Bench, k: int, *, quick: bool) -> dict[str, Result]:
    """Print the table of one k; results by case."""
    print(f"\nk = {k}\n")
    test = bench.traces("test", k)
    rows: list[list[str]] = []
    for name, bits, distances in measure_baselines(group_traces(test, _SMALL), bench.vocab_size):
        rows.append([name, f"{bits:,.1f}", "", "", "", "", *show_kl(distances), *[""] * 4])
    for name, quoted, kl in QUOTED_BITS[k]:
        rows.append([name, f"{quoted:,}", "", "", "", "", kl, *[""] * 5])
    results = {case.name: bench.measure(case) for case in list_cases(k, quick=quick)}
    rows += [show_result(name, result) for name, result in results.items()]
    print_table(_HEAD, rows)
    return {f"{name} k={k}": result for name, result in results.items()}


def list_cases(k: int, *, quick: bool) -> list[Case]:
    cases = [
        Case("exact, bf16 logits", CodecSpec("exact", k), bf16=True),
        Case("fine", CodecSpec("fine", k)),
        Case("standard", CodecSpec("standard", k)),
    ]
    if not quick:
        cases.insert(0, Case("exact, float32 logits", CodecSpec("exact", k)))
        cases.append(Case("compact", CodecSpec("compact", k)))
    if k == 64:
        cases.append(Case("standard, p ≥ 1e-3", CodecSpec("standard", k, min_probability=1e-3)))
        cases.append(Case("compact, p ≥ 1e-3", CodecSpec("compact", k, min_probability=1e-3)))
        cases.append(Case("standard, 1 tail draw", CodecSpec("standard", k, tail_draws=1)))
    if k == 64 and not quick:
        cases.append(Case("standard, 4 tail draws", CodecSpec("standard", k, tail_draws=4)))
        cases.append(Case("standard, p ≥ 1e-2", CodecSpec("standard", k, min_probability=1e-2)))
    return cases


def show_result(name: str, result: Result) -> list[str]:
    saved = result.bare_bits - result.bits
    kept = result.given.mean_kept
    return [
        f"lynearm {name}" + ("" if kept == round(kept) else f" ({kept:.1f})"),
        f"{result.bits:,.1f}",
        f"{result.bulk_bits:,.1f}",
        f"{result.bare_bits:,.1f}",
        f"{result.dictionary_bytes:,}",
        f"{result.dictionary_bytes * 8 / saved:,.0f}" if saved > 0 else "never",
        *show_kl(result.distances),
        f"{result.given.mean_mass:.3f}",
        f"{result.speed.encode_per_second / 1e6:.2f}",
        f"{result.speed.decode_per_second / 1e6:.2f}",
        f"{result.speed.block_bytes / 1e3:,.0f}",
    ]


def show_kl(distances: Distances | None) -> list[str]:
    if distances is None or distances.kl_p999 == 0:
        return ["0", "0"]
    return [f"{distances.kl_mean:.1e}", f"{distances.kl_p999:.1e}"]


def report_draws(bench: Bench) -> None:
    """Mode "sampled": draws in place of a top k; KL does not apply, since what was not drawn has no mass."""
    train, test, whole = (draw_traces(bench.rows(part), _DRAWS) for part in ("train", "test", "whole"))
    result = bench.measure_traces(CodecSpec("sampled", draws=_DRAWS), train, test, whole)
    width = bench.corpus.logprobs_NK.shape[1]
    print(f"\n{_DRAWS} draws a position, from its {width} likeliest tokens (their tail dropped)\n")
    kept = result.given.mean_kept
    head = [*_HEAD[:6], "total\nvariation", *_HEAD[9:]]
    others = ["random-sampling KD, 24 bits a token", f"{24 * kept:,.1f}", *[""] * 8]
    shown = show_result("sampled", result)
    print_table(head, [others, [*shown[:6], f"{drawn_variation(bench, result):.3f}", *shown[9:]]])


def drawn_variation(bench: Bench, result: Result) -> float:
    """Mean total variation of the draws from the whole row."""
    rows = bench.rows("test")
    full = Rows(rows.token_ids_NK, rows.logprobs_NK, rows.tail_mass_N.astype(np.float32))
    p_NK, total = full.distribution(), 0.0
    for t, (ids_K, logprobs_K) in enumerate(
        zip(result.returned.token_ids_NK, result.returned.logprobs_NK, strict=True)
    ):
        drawn = dict(zip(ids_K.tolist(), np.exp(logprobs_K.astype(np.float64)).tolist(), strict=True))
        q_K = np.array([drawn.get(token_id, 0.0) for token_id in rows.token_ids_NK[t].tolist()] + [0.0])
        total += float(np.abs(p_NK[t] - q_K).sum()) / 2
    return total / rows.positions


def report_pieces(bench: Bench) -> float:
    """Print what streaming costs: blocks of 16 positions against blocks of 256 of the same pieces."""
    print(
        f"\nblocks of {_PIECE} positions, against blocks of {_SMALL} of the same pieces; standard, k = 64\n"
    )
    spec = CodecSpec("standard", 64)
    pieces = [piece for trace in bench.traces("test", 64) for piece in cut_trace(trace, _PIECE)]
    per_block = _SMALL // _PIECE
    single = [[piece] for piece in pieces]
    sixteen = [pieces[start : start + per_block] for start in range(0, len(pieces), per_block)]
    measured = {
        name: measure_pieces(Coder.train(blocks, spec, bench.vocab_size), single, sixteen)
        for name, blocks in group_for_training(bench).items()
    }
    best = min(measured, key=lambda name: measured[name].small + measured[name].large)
    overhead = measured[best].overhead
    measured["none"] = measure_pieces(Coder(spec, bench.vocab_size), single, sixteen)
    head = (
        "dictionary trained on",
        f"bits/token\nat {_PIECE}",
        f"\nat {_SMALL}",
        "\nabove",
        "of it header\nand metadata",
        "\nof it rows",
        "",
    )
    rows = [
        [
            name,
            f"{cost.small:,.1f}",
            f"{cost.large:,.1f}",
            f"{cost.overhead:.1%}",
            f"{cost.frame_share:.1%}",
            f"{cost.overhead - cost.frame_share:.1%}",
            "← least in sum: the figure" if name == best else "",
        ]
        for name, cost in measured.items()
    ]
    print_table(head, rows)
    return overhead


def measure_pieces(coder: Coder, small: Blocks, large: Blocks) -> PieceCost:
    return PieceCost(*measure_split(coder, small), *measure_split(coder, large))


def group_for_training(bench: Bench) -> dict[str, Blocks]:
    traces = bench.traces("train", 64)
    half = len(traces) // 2

    def cut(some: Sequence[Trace]) -> list[list[Trace]]:
        return [[piece] for trace in some for piece in cut_trace(trace, _PIECE)]

    return {
        "half of each": [*group_traces(traces[:half], _SMALL), *cut(traces[half:])],
        f"blocks of {_SMALL}": group_traces(traces, _SMALL),
        f"blocks of {_PIECE}": cut(traces),
    }


def measure_split(coder: Coder, blocks: Blocks) -> tuple[float, float]:
    """Bits per token, and those of them that are not rows."""
    encoded = coder.encode(blocks)
    tokens = sum(map(count_tokens, blocks))
    size = sum(map(len, encoded))
    return size * 8 / tokens, (size - sum(map(rows_bytes, encoded))) * 8 / tokens


def summarise(results: dict[str, Result], piece_overhead: float) -> dict[str, float]:
    standard = results["standard k=64"]
    return {
        "standard_k64_bits": standard.bits,
        "standard_k64_kl": standard.distances.kl_mean,
        "standard_k64_kl_p999": standard.distances.kl_p999,
        "standard_adaptive_bits": results["standard, p ≥ 1e-3 k=64"].bits,
        "tail_draw_bits": results["standard, 1 tail draw k=64"].bits - standard.bits,
        "compact_adaptive_bits": results["compact, p ≥ 1e-3 k=64"].bits,
        "fine_k64_bits": results["fine k=64"].bits,
        "exact_bf16_k64_bits": results["exact, bf16 logits k=64"].bits,
        "decode_k64_tokens_per_second": standard.speed.decode_per_second,
        "decode_k16_tokens_per_second": results["standard k=16"].speed.decode_per_second,
        "encode_k64_tokens_per_second": standard.speed.encode_per_second,
        "block16_overhead": piece_overhead,
        "no_dictionary_overhead": standard.bare_bits / standard.bits - 1,
    }


def report_goals(results: dict[str, Result], figures: dict[str, float]) -> None:
    bits = {name: result.bits for name, result in results.items()}
    compact = results["compact, p ≥ 1e-3 k=64"]
    goals = [
        Goal.at_most("standard k=16, bits/token", bits["standard k=16"], 235),
        Goal.at_most("standard k=64", bits["standard k=64"], 830),
        Goal.at_most("standard k=64, stretch", bits["standard k=64"], 790),
        *[Goal.at_most(name, bits[name], 1590) for name in ("standard k=128",) if name in bits],
        Goal.at_most("standard p ≥ 1e-3, cap 64", figures["standard_adaptive_bits"], 345),
        Goal.at_most("compact p ≥ 1e-3, cap 64", figures["compact_adaptive_bits"], 310),
        Goal.at_most("fine k=64", figures["fine_k64_bits"], 1060),
        Goal.at_most("exact k=64, bf16 logits", figures["exact_bf16_k64_bits"], 880),
        Goal.at_most("added KL of fine k=64, mean", results["fine k=64"].distances.kl_mean, 1e-6, ".1e"),
        Goal.at_most("added KL of standard k=64", figures["standard_k64_kl"], 1e-4, ".1e"),
        Goal.at_most("added KL of compact p ≥ 1e-3", compact.distances.kl_mean, 1e-3, ".1e"),
        Goal.at_most("blocks of 16 above blocks of 256", figures["block16_overhead"], 0.04, ".1%"),
        Goal.at_most("no dictionary above one", figures["no_dictionary_overhead"], 0.12, ".1%"),
        Goal.at_least("decode k=16, tokens/s", figures["decode_k16_tokens_per_second"], 6e6),
        Goal.at_least("decode k=64", figures["decode_k64_tokens_per_second"], 2e6),
        Goal.at_least("encode k=64", figures["encode_k64_tokens_per_second"], 0.5e6),
    ]
    print("\ntargets, which were set for SmolLM2's rows\n")
    rows = [[goal.what, goal.measured, goal.bound, "holds" if goal.holds else "MISSED"] for goal in goals]
    print_table(["", "measured", "target", ""], rows)


if __name__ == "__main__":
    sys.exit(main())
