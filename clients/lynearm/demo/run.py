"""Runs the whole path on one machine, each role as the process that it is elsewhere.

    prepare ─► serve ─► teach ──────────────┐
                 └────► cut ─► train ───────┴─► replay ─► export ─► sample, table, report

The teacher has one core and the student the other while both run; whoever is left gets both.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lynearm.client import StreamInfo, TraceClient
from lynearm.demo.config import DemoConfig
from lynearm.demo.display import StageDisplay
from lynearm.demo.outcome import DemoOutcome, ExportOutcome, print_outcome
from lynearm.demo.processes import Event, RoleProcess
from lynearm.wire.errors import InternalError

STREAM = "demo"
_READY_SECONDS = 60.0


@dataclass(slots=True)
class _Seen:
    """What the roles said; written by the threads that read them."""

    address: str = ""
    ready: threading.Event = field(default_factory=threading.Event)
    teaching: threading.Event = field(default_factory=threading.Event)
    teach_done: bool = False
    teach_report: Mapping[str, Any] = field(default_factory=dict[str, Any])
    train_report: Mapping[str, Any] = field(default_factory=dict[str, Any])
    exports: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def run_demo(config: DemoConfig, console: Console) -> DemoOutcome:
    """Run the demo, print its table and write its report.

    Raises:
        LynearmError: what a stage said when it failed; its log lies under `config.out`/logs.
    """
    return _Demo(config, console).run()


class _Demo:
    """One demo: the state that its stages share."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self._config = config
        self._display = StageDisplay(console)
        self._out = config.out
        self._logs = config.out / "logs"
        self._seen = _Seen()
        self._started = time.monotonic()

    def run(self) -> DemoOutcome:
        _empty_directory(self._out)
        self._logs.mkdir(parents=True)
        with self._display, ExitStack() as roles:
            teacher = self._prepare()
            roles.enter_context(self._serve())
            teach = roles.enter_context(self._teach(teacher))
            student = self._cut(teacher)
            self._wait_for_stream(teach)
            train = roles.enter_context(self._train(student))
            self._wait_for(teach, train)
            with TraceClient(self._seen.address) as client:
                stream = client.get_stream(STREAM)
        with self._display:
            self._export()
        outcome = self._outcome(stream, teacher)
        print_outcome(outcome, self._display.console)
        return outcome

    def _prepare(self) -> Path:
        """The teacher's directory."""
        self._display.update("prepare", "reading the teacher")
        if self._config.teacher is not None:
            self._display.finish("prepare", str(self._config.teacher))
            return self._config.teacher
        from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2

        directory = prepare_smollm2(
            self._config.cache_dir or default_cache_dir(),
            lambda message, fraction: self._display.update("prepare", message, fraction),
        )
        self._display.finish("prepare", "SmolLM2-135M-Instruct")
        return directory

    def _serve(self) -> RoleProcess:
        arguments = ["serve", "--data-dir", str(self._out / "traces"), "--port", "0", "--progress", "json"]
        self._display.update("serve", "starting the trace service")
        process = self._role("serve", arguments, self._on_serve)
        if not self._seen.ready.wait(_READY_SECONDS):
            process.stop()
            process.wait()
            raise InternalError("the trace service did not start", f"look at {self._logs / 'serve.log'}")
        self._display.finish("serve", f"trace service on {self._seen.address}")
        return process

    def _teach(self, teacher: Path) -> RoleProcess:
        config = {
            "model": str(teacher),
            "prompts": str(self._config.prompts),
            "stream": STREAM,
            "license": "Apache-2.0",
            "service": self._seen.address,
            "top_k": self._config.top_k,
            "max_tokens": self._config.max_tokens,
            "max_batch": self._config.max_batch,
            "max_model_len": 512,
            "threads": 1,
        }
        self._display.update("teach", "starting Ray and vLLM")
        return self._configured_role("teach", config, self._on_teach)

    def _cut(self, teacher: Path) -> Path:
        from lynearm.student.cutting import cut_student

        self._display.update("cut", "cutting the student out of the teacher")
        layers = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
        kept = tuple(layer for layer in range(layers) if layer not in self._config.dropped_layers)
        student = self._out / "student-init"
        cut_student(teacher, student, layers=kept)
        self._display.finish("cut", f"kept {len(kept)} of {layers} layers")
        return student

    def _train(self, student: Path) -> RoleProcess:
        config = {
            "student": str(student),
            "stream": STREAM,
            "service": self._seen.address,
            "out": str(self._out / "student"),
            "learning_rate": self._config.learning_rate,
            "epochs": self._config.epochs,
            "max_seconds": self._config.train_seconds,
            "batch_sequences": self._config.batch_sequences,
            "eval_every_steps": self._config.eval_every_steps,
            "held_out_traces": 30,
            "freeze_embeddings": True,
            "threads": 1,
            "replay_threads": 2,
        }
        self._display.update("train", "loading the student")
        return self._configured_role("train", config, self._on_train)

    def _export(self) -> None:
        checkpoint = str(self._out / "student")
        jobs = [("mlx-16", ["mlx", "--bits", "16"]), ("mlx-4", ["mlx", "--bits", "4"])]
        if self._config.coreml:
            jobs.append(("coreml", ["coreml", "--bits", "8"]))
        for name, arguments in jobs:
            self._display.update(name, "exporting")
            out = str(self._out / name)
            command = ["export", arguments[0], checkpoint, "--out", out, *arguments[1:], "--progress", "json"]
            with self._role(name, command, self._on_export(name)) as process:
                process.wait()
            self._display.finish(name, "exported and checked")

    def _configured_role(
        self, role: str, config: Mapping[str, object], on_event: Callable[[Event], None]
    ) -> RoleProcess:
        # A file, and not flags, so that a curious reader can run the same command again.
        path = self._out / f"{role}.toml"
        path.write_text(f"[{role}]\n" + "".join(f"{key} = {json.dumps(one)}\n" for key, one in config.items()))
        return self._role(role, [role, "--config", str(path), "--progress", "json"], on_event)

    def _role(self, role: str, arguments: list[str], on_event: Callable[[Event], None]) -> RoleProcess:
        return RoleProcess(role, arguments, log_path=self._logs / f"{role}.log", on_event=on_event)

    def _wait_for_stream(self, teach: RoleProcess) -> None:
        while not self._seen.teaching.wait(0.5):
            if teach.wait(0):
                return

    def _wait_for(self, teach: RoleProcess, train: RoleProcess) -> None:
        while not (teach.wait(0.2) and train.wait(0.2)):
            if not train.running:
                train.wait()
                # A trainer that ends early leaves the teacher alone with the rest of its prompts.
                teach.wait()

    def _on_serve(self, event: Event) -> None:
        if event.get("event") == "ready":
            self._seen.address = str(event["address"])
            self._seen.ready.set()

    def _on_teach(self, event: Event) -> None:
        if event.get("event") == "teach_report":
            self._seen.teach_report = event
            self._seen.teach_done = True
            tokens, seconds = event["completion_tokens"], event["generating_seconds"]
            rate = tokens / max(seconds, 1e-9)
            self._display.finish("teach", f"{tokens:,} tokens of {event['completed']} prompts, {rate:.0f} tok/s")
        elif event.get("event") == "teach_progress":
            if event["stream_ready"]:
                self._seen.teaching.set()
            self._display.update("teach", describe_teach(event), event["prompts_done"] / event["prompts_total"])

    def _on_train(self, event: Event) -> None:
        if event.get("event") == "train_report":
            self._seen.train_report = event
            first, last = event["evaluations"][0]["kl"], event["evaluations"][-1]["kl"]
            self._display.finish("train", f"{event['steps']} steps, held-out KL {first:.3f} → {last:.3f}")
        elif event.get("event") == "train_progress":
            self._display.update("train", describe_train(event))
