"""Runs the whole path on one machine, each role as the process that it is elsewhere.

    prepare ─► serve ─► teach ────────────────┐
                 └────► cut ─► train ─────────┴─► mlx, coreml ─► sample, table, report

The teacher has one core and the student the other while both run; whoever is left may use both.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from lynearm.client import StreamInfo, TraceClient
from lynearm.demo.config import DemoConfig
from lynearm.demo.display import StageDisplay
from lynearm.demo.events import describe_export, describe_teach, describe_train
from lynearm.demo.findings import Findings, collect_report
from lynearm.demo.processes import Event, RoleProcess
from lynearm.demo.report import write_report
from lynearm.demo.report_data import DemoReport, TextSample
from lynearm.demo.summary import print_summary
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import ConfigError, InternalError
from lynearm.wire.traces import Trace

STREAM = "demo"

_PARITY_POSITIONS = 32
"""Compared in each export; a wrong graph shows at the first of them."""

_SPOKEN_PROMPTS = 3
_SPOKEN_TOKENS = 32
"""Of each answer: MLX on a CPU takes a sixth of a second for one."""

_READY_SECONDS = 60.0
_STREAM_SECONDS = 600.0
"""The teacher makes the stream once it is loaded; the student, loaded before, waits for it."""

_MARKER = ".lynearm-demo"
"""Says that a directory is a demo's own and may be replaced by the next one."""


def run_demo(config: DemoConfig, console: Console) -> DemoReport:
    """Run the demo, print its table and write `report.html`.

    Raises:
        ConfigError: if `config.out` holds something that is not an earlier demo.
        LynearmError: what a stage said when it failed; its log lies under `config.out`/logs.
    """
    _claim_directory(config.out)
    report = _Demo(config, console).run()
    write_report(config.out / "report.html", report)
    print_summary(report, console, config.out)
    return report


@dataclass(slots=True)
class _Heard:
    """What the roles said; written by the threads that read them."""

    address: str = ""
    serving: threading.Event = field(default_factory=threading.Event)
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


class _Demo:
    """One demo: the state that its stages share."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self._config = config
        self._display = StageDisplay(console)
        self._out = config.out.absolute()
        self._heard = _Heard()
        self._exporting: list[RoleProcess] = []
        self._stopping = threading.Event()

    def run(self) -> DemoReport:
        with self._display:
            teacher = self._prepare()
            with ExitStack() as roles:
                roles.enter_context(self._serve())
                teach = roles.enter_context(self._teach(teacher))
                student = self._cut(teacher)
                train = roles.enter_context(self._train(student))
                self._wait(teach, train)
                stream, spoken = self._look_at_stream()
            checkpoint = Path(self._heard.reports["train"]["checkpoint"])
            self._export(checkpoint)
            samples = self._speak(spoken)
        return collect_report(
            Findings(
                config=self._config,
                teacher=teacher,
                student=checkpoint,
                stream=stream,
                reports=self._heard.reports,
                timings=self._display.timings,
                samples=samples,
            )
        )

    def _prepare(self) -> Path:
        """The teacher's directory."""
        self._display.update("prepare", "reading the teacher")
        if self._config.teacher is not None:
            self._display.finish("prepare", str(self._config.teacher))
            return self._config.teacher
        from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2

        directory = prepare_smollm2(
            self._config.cache_dir or default_cache_dir(),
            lambda text, fraction: self._display.update("prepare", text, fraction),
        )
        self._display.finish("prepare", f"teacher in {directory}")
        return directory

    def _serve(self) -> RoleProcess:
        arguments = ["--data-dir", str(self._out / "traces"), "--port", "0"]
        self._display.update("serve", "starting the trace service")
        process = self._role("serve", ["serve", *arguments], self._on_serve)
        if not self._heard.serving.wait(_READY_SECONDS):
            process.stop()
            process.wait()
            raise InternalError("the trace service did not start", f"look at {self._out / 'logs/serve.log'}")
        self._display.finish("serve", f"trace service on {self._heard.address}")
        return process

    def _teach(self, teacher: Path) -> RoleProcess:
        settings = {
            "model": str(teacher),
            "prompts": str(self._config.prompts.absolute()),
            "stream": STREAM,
            "license": "Apache-2.0",
            "service": self._heard.address,
            "top_k": self._config.top_k,
            "max_tokens": self._config.max_tokens,
            "temperature": self._config.temperature,
            "max_batch": self._config.max_batch,
            "max_model_len": 512,
            "threads": 1,
        }
        self._display.update("teach", "starting Ray and vLLM")
        return self._configured_role("teach", settings, self._on_teach)

    def _cut(self, teacher: Path) -> Path:
        from lynearm.student.cutting import cut_student

        self._display.update("cut", "cutting the student out of the teacher")
        layers = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
        kept = tuple(layer for layer in range(layers) if layer not in self._config.dropped_layers)
        student = self._out / "student-start"
        cut_student(teacher, student, layers=kept)
        self._display.finish("cut", f"student of {len(kept)} of the teacher's {layers} layers")
        return student

    def _train(self, student: Path) -> RoleProcess:
        settings = {
            "student": str(student),
            "stream": STREAM,
            "service": self._heard.address,
            "wait_seconds": _STREAM_SECONDS,
            "out": str(self._out / "student"),
            "learning_rate": self._config.learning_rate,
            "loss": [
                "forward-kl:1",
                *([f"cross-entropy:{self._config.ce_weight}"] if self._config.ce_weight else []),
            ],
            "epochs": self._config.epochs,
            "schedule": "cosine",
            "max_steps": self._config.train_steps,
            "max_seconds": self._config.train_seconds,
            "batch_sequences": self._config.batch_sequences,
            "micro_batch_tokens": self._config.micro_batch_tokens,
            "warmup_steps": 5,
            "eval_every_steps": self._config.eval_every_steps,
            "held_out_traces": self._config.held_out_traces,
            "freeze_embeddings": True,
            "threads": 1,
            "replay_threads": 2,
        }
        self._display.update("train", "loading the student")
        return self._configured_role("train", settings, self._on_train)

    def _wait(self, teach: RoleProcess, train: RoleProcess) -> None:
        # A role that fails ends the demo at once: the other would wait for it.
        while teach.running or train.running:
            for role in (teach, train):
                if not role.running:
                    role.wait()
            train.wait(0.2)
        teach.wait()
        train.wait()

    def _look_at_stream(self) -> tuple[StreamInfo, list[Trace]]:
        """The stream, and its first held-out trace of each topic, in the order of the prompts."""
        with TraceClient(self._heard.address) as client:
            stream = client.get_stream(STREAM)
            blocks = client.fetch(STREAM, 0, stream.next_offset)
            dictionaries = client.dictionaries(STREAM)
            traces = [
                trace
                for received in blocks
                for trace in decode_block(received.block, dictionaries=dictionaries)
            ]
        held_out = [trace for trace in traces if trace.tags.get("split") == "held_out"]
        by_id = {trace.prompt_id: trace for trace in held_out or traces}
        of_each_topic: dict[str, Trace] = {}
        for prompt_id in self._prompt_texts:
            if (trace := by_id.get(prompt_id)) is not None:
                of_each_topic.setdefault(trace.tags.get("topic", prompt_id), trace)
        return stream, list(of_each_topic.values())[:_SPOKEN_PROMPTS]

    def _export(self, checkpoint: Path) -> None:
        """Two exports at a time, the longest beside the others.

        Each has one thread: with two each, on two cores, they would spend most of their time waiting for a
        thread of their own that is not scheduled.
        """

        def mlx(bits: int) -> None:
            self._export_one(f"mlx-{bits}", ["mlx", str(checkpoint), "--bits", str(bits)])

        def others() -> None:
            if self._config.coreml:
                self._export_one("coreml", ["coreml", str(checkpoint), "--bits", "8"])
            mlx(16)

        jobs: list[Callable[[], None]] = [lambda: mlx(4), others]
        with ThreadPoolExecutor(len(jobs)) as executor:
            try:
                for future in [executor.submit(job) for job in jobs]:
                    future.result()
            except BaseException:
                # Whatever ended one ends the others: Ctrl-C must not wait for an export.
                self._stopping.set()
                for process in list(self._exporting):
                    process.stop()
                raise

    def _export_one(self, name: str, arguments: list[str]) -> None:
        if self._stopping.is_set():
            return
        self._display.update(name, "loading")
        positions = f"parity_tokens={_PARITY_POSITIONS}"
        command = ["export", *arguments, "--out", str(self._out / name), "--set", positions]
        with self._role(name, command, lambda event: self._on_export(name, event), threads=1) as process:
            self._exporting.append(process)
            process.wait()

    def _speak(self, traces: Sequence[Trace]) -> list[TextSample]:
        """What the 4-bit MLX student answers where the teacher answered with these."""
        from lynearm.export.speech import generate_texts_mlx

        self._display.update("speak", "the 4-bit MLX student answers")
        prompts = [self._prompt_texts[trace.prompt_id] for trace in traces]
        texts = generate_texts_mlx(self._out / "mlx-4", prompts, max_tokens=_SPOKEN_TOKENS)
        self._display.finish("speak", f"{len(texts)} answers, {sum(map(len, texts))} characters")
        return [
            TextSample(prompt, text, trace.completion_text)
            for prompt, text, trace in zip(prompts, texts, traces, strict=True)
        ]

    @cached_property
    def _prompt_texts(self) -> dict[str, str]:
        """What the user says in each prompt of the file, by prompt id, in order."""
        from lynearm.teacher.prompt_sources import load_prompts

        prompts = load_prompts(self._config.prompts).prompts
        return {one.prompt_id: one.text or one.messages[-1].content for one in prompts}

    def _configured_role(
        self, role: str, settings: Mapping[str, object], on_event: Callable[[Event], None]
    ) -> RoleProcess:
        # A file, and not flags, so that a curious reader can run the same command again.
        path = self._out / f"{role}.toml"
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        path.write_text(f"[{role}]\n" + "".join(lines))
        return self._role(role, [role, "--config", str(path)], on_event)

    def _role(
        self, name: str, arguments: list[str], on_event: Callable[[Event], None], *, threads: int = 0
    ) -> RoleProcess:
        log_path = self._out / "logs" / f"{name}.log"
        log_path.parent.mkdir(exist_ok=True)
        return RoleProcess(
            name,
            [*arguments, "--progress", "json"],
            log_path=log_path,
            on_event=on_event,
            threads=threads,
        )

    def _on_serve(self, event: Event) -> None:
        if event["event"] == "ready":
            self._heard.address = str(event["address"])
            self._heard.serving.set()

    def _on_teach(self, event: Event) -> None:
        if event["event"] == "teach_report":
            self._heard.reports["teach"] = event
            self._display.finish("teach", describe_teach(event))
        elif event["event"] == "teach_progress":
            fraction = event["done_prompts"] / event["prompts"] if event["prompts"] else None
            self._display.update("teach", describe_teach(event), fraction)

    def _on_train(self, event: Event) -> None:
        if event["event"] == "train_report":
            self._heard.reports["train"] = event
            self._display.finish("train", describe_train(event))
        elif event["event"] == "train_progress":
            self._display.update("train", describe_train(event))

    def _on_export(self, name: str, event: Event) -> None:
        if event["event"].endswith("_progress"):
            self._display.update(name, describe_export(event), event["fraction"])
        else:
            self._heard.reports[name] = event
            self._display.finish(name, describe_export(event))


def _claim_directory(out: Path) -> None:
    """Empty a directory that a demo made; refuse any other that is not empty."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            raise ConfigError(f"{out} is not empty and no demo made it", "name another directory with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
