"""`lynearm serve` as a process: its JSON log, its metrics, and calls to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from lynearm.client import Credentials
from lynearm.client.credentials import open_channel
from lynearm.v1 import trace_service_pb2_grpc

_METRICS = re.compile(r"metrics: (\S+:\d+)\W")
_READY = re.compile(r"serving .* at (\S+:\d+)\W")


class ServeCommand:
    """A server that ends with its context, if it has not before.

    Args:
        data_dir: Of the server.
        arguments: Further flags.
        credentials: Of the calls to it.
        environment: Of the process; None: that of the tests.
    """

    def __init__(
        self,
        data_dir: Path,
        *arguments: str,
        credentials: Credentials = Credentials(),  # noqa: B008  (immutable)
        environment: Mapping[str, str] | None = None,
    ) -> None:
        flags = ("--port", "0", "--metrics-port", "0", "--log-format", "json", "--progress", "none")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lynearm.cli.main", "serve", "--data-dir", data_dir, *flags, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready.wait(60)
        log = "".join(self.lines)
        ready, metrics = _READY.search(log), _METRICS.search(log)
        assert ready is not None, log
        assert metrics is not None, log
        self.address, self.metrics_address = ready[1], metrics[1]
        self._channel = open_channel(self.address, credentials)
        self.stub = trace_service_pb2_grpc.TraceServiceStub(self._channel)

    def __enter__(self) -> ServeCommand:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)
        self._reader.join(60)

    @property
    def channel(self) -> grpc.Channel:
        return self._channel

    def log(self) -> list[dict[str, Any]]:
        """The records so far."""
        return [json.loads(line) for line in list(self.lines)]

    def metrics(self) -> dict[tuple[str, ...], float]:
        """By name and the values of the labels, in the order of their names."""
        return scrape(self.metrics_address)

    def wait_for_metric(self, name: str, at_least: float, *labels: str) -> None:
        for _ in range(600):
            if self.metrics().get((name, *labels), -1) >= at_least:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} stays at {self.metrics().get((name, *labels))}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                if _READY.search(line):
                    self._ready.set()
        self._ready.set()


def scrape(address: str) -> dict[tuple[str, ...], float]:
    """The metrics that an address shows, read by Prometheus' own parser."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
