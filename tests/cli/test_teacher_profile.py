"""`lynearm teacher profile`: what is stored with a stream, as a table, as JSON and as a drawing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from models.service_process import ServiceProcess
from models.trace_blocks import make_spec
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.client import TraceClient
from lynearm.wire.profiles import LayerStatistics, TeacherProfile, encode_profile


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process


def measure(layer: int, positions: int, neurons: int = 12) -> LayerStatistics:
    rng = np.random.default_rng(layer)
    sums = rng.uniform(1, 2, neurons) * positions
    sums[:3] *= 0.01
    heads = rng.uniform(0.5, 4, 3) * positions
    return LayerStatistics(positions, 0.5**layer * positions, heads, heads / 2, sums)


def store(service: ServiceProcess, *, neurons: int = 12) -> None:
    """Two workers' sums."""
    with TraceClient(service.target) as client:
        client.open_stream(make_spec("lessons"))
        for worker, positions in (("a", 30), ("b", 10)):
            layers = {layer: measure(layer, positions, neurons) for layer in range(4)}
            for number, part in enumerate(encode_profile(TeacherProfile("<tiny> & co", "r", layers))):
                client.attachments.put("lessons", f"profile.{worker}.{number}", part)
        client.attachments.put("lessons", "something-else", b"not a profile")


def run(service: ServiceProcess, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(
        app, ["teacher", "profile", *arguments, "--service", service.target], env={"COLUMNS": "120"}
    )
    return result.exit_code, result.stdout, result.stderr


def test_the_sums_of_all_workers_are_shown(service: ServiceProcess) -> None:
    store(service)
    code, output, _ = run(service, "lessons")
    assert code == 0
    assert "<tiny> & co: 40 completion positions" in output
    rows = [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row[1]) for row in rows] == [1.0, 0.5, 0.25, 0.125]
    # Three of twelve neurons are quiet.
    assert all(row[-1] == "25.0%" for row in rows)


def test_json_says_everything(service: ServiceProcess) -> None:
    store(service)
    code, output, _ = run(service, "lessons", "--json")
    assert code == 0
    found = json.loads(output)
    assert found["positions"] == 40
    assert [layer["block_influence"] for layer in found["layers"]] == [1.0, 0.5, 0.25, 0.125]
    expected = measure(2, 40)
    assert found["layers"][2]["head_contributions"] == pytest.approx(expected.head_contributions.tolist())
    assert found["layers"][2]["neuron_activations"] == pytest.approx(expected.neuron_activations.tolist())


@pytest.mark.parametrize("neurons", [12, 0])
def test_a_drawing_is_a_picture_by_itself(service: ServiceProcess, tmp_path: Path, neurons: int) -> None:
    store(service, neurons=neurons)
    code, _, said = run(service, "lessons", "--plot", str(tmp_path / "profile.svg"))
    assert code == 0
    assert "profile.svg" in said
    drawing = (tmp_path / "profile.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(drawing)
    panels = root.findall("{http://www.w3.org/2000/svg}svg")
    assert len(panels) == (3 if neurons else 2)
    assert ">&lt;tiny&gt; &amp; co</text>" in drawing
    assert len(root.findall(".//{http://www.w3.org/2000/svg}title")) >= 4 + 4 * 3


def test_a_stream_without_a_profile_says_how_to_get_one(service: ServiceProcess) -> None:
    with TraceClient(service.target) as client:
        client.open_stream(make_spec("lessons"))
    code, _, said = run(service, "lessons")
    assert code != 0
    assert "stream 'lessons' has no teacher profile" in said
    assert "--stats layers" in said
