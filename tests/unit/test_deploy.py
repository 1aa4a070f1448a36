"""What is shipped for running a server names what exists: metrics, files, flags, settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from router.prometheus import PrometheusMetrics, Serving
from router.tasks import TaskKey
from tests.fakes import FakeEncoder, make_snapshot
from trainer.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "promptyard.service").read_text(encoding="utf-8")
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def served() -> dict[str, set[str]]:
    """Names of all samples that a server may tell, with their labels."""
    metrics = PrometheusMetrics()
    metrics.watch(lambda: {"": Serving(1, 1, 1, 0, {"routing": 0})})
    metrics.call_ended("Route", "OK", 0.1)
    metrics.stage_ended("routing_wait", 0.1)
    metrics.batch_ended("routing", 1)
    metrics.cache_used(hits=1, misses=1)
    metrics.decided(make_snapshot().decide(FakeEncoder().encode(["weather"]))[0])
    metrics.compared(
        "shadow",
        TaskKey("weather", 2),
        make_snapshot().decide(FakeEncoder().encode(["weather"]))[0],
    )
    metrics.shadow_differed(TaskKey("weather", 2))
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, {"instance"}).update(sample.labels)
    return found


def test_every_panel_of_the_dashboard_asks_for_metrics_and_labels_that_exist(
    served: dict[str, set[str]],
) -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert len(expressions) >= 12
    for expression in expressions:
        names = re.findall(r"\b(?:promptyard|process)_[a-z_]+", expression)
        assert names, expression
        for name in names:
            assert name in served, expression
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        labels = {label.strip() for group in grouped for label in group.split(",")}
        assert labels <= set.intersection(*(served[name] for name in names)), expression


def test_the_panels_do_not_cover_one_another() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_the_image_copies_what_exists_and_runs_as_an_ordinary_user() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
    stages = DOCKERFILE.split("\nFROM ")[1:]
    assert len(stages) == 2
    last = stages[-1]
    assert re.search(r"^USER promptyard$", last, re.MULTILINE)
    assert last.index("USER") < last.index("ENTRYPOINT")


def test_the_image_and_the_unit_name_settings_and_flags_that_exist() -> None:
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    variables = {str(parameter.envvar) for parameter in command.params if parameter.envvar}
    flags = {option for parameter in command.params for option in parameter.opts}
    for text in (DOCKERFILE, UNIT):
        assert set(re.findall(r"PROMPTYARD_[A-Z_]+", text)) <= variables
    for line in re.findall(r"promptyard serve (.*)$", UNIT, re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", line)) <= flags


def test_the_unit_gives_accepted_calls_the_time_to_finish() -> None:
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    [shutdown] = [p.default for p in command.params if p.name == "shutdown_seconds"]
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert float(stop) > shutdown
