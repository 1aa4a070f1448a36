"""The shape of the house: who may import whom, and what nobody does."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.bootstrap import load_encoder
from trainer.commands import RegisterTask
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

ROOT = Path(__file__).parent.parent

HEAVY = (
    "torch",
    "faiss",
    "transformers",
    "sentence_transformers",
    "onnx",
    "onnxruntime",
    "sklearn",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
)

# The only places that may say which backend it is: whoever puts a process together, and what
# builds or measures one certain model.
NAMES_BACKENDS = ("router/bootstrap.py", "router/backends/", "trainer/base_model/")
# Tuning needs gradients through the model, which no seam can hide.
NAMES_TORCH_MODEL = (
    "trainer/tuning.py",
    "trainer/prompt_quality.py",
    "trainer/initialisation.py",
    "trainer/base_facts.py",
    "trainer/checkpoint.py",
    "trainer/encoder_prompts.py",
    "trainer/example_prompt.py",
    "trainer/gradients.py",
    "trainer/inspection.py",
    "trainer/job_tuning.py",
    "trainer/peft_exchange.py",
    "trainer/prompt_import.py",
    "trainer/prompt_parameters.py",
    "trainer/task_tuning.py",
)


def modules(*packages: str) -> list[Path]:
    return [
        path
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if "v1" not in path.relative_to(ROOT).parts
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_the_top(path: Path) -> set[str]:
    """What is imported as soon as the module is."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    top = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    found = set()
    for node in top.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


def run_python(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_import_contracts_hold() -> None:
    command = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run(
        [str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    "module", ["router", "router.client", "router.errors", "trainer", "trainer.cli"]
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    found = run_python(f"import {module}, sys; print(*sys.modules)").split()
    assert module in found
    assert [name for name in HEAVY if name in found] == []


@pytest.mark.parametrize("module", ["router.server", "router.routing", "router.live"])
def test_the_server_itself_needs_no_deep_learning_library(module: str) -> None:
    found = run_python(f"import {module}, sys; print(*sys.modules)").split()
    assert {"torch", "transformers", "sentence_transformers", "sklearn", "scipy"}.isdisjoint(found)


def test_a_server_that_routes_over_a_catalog_loads_nothing_that_compiles_heads(
    tmp_path: Path,
) -> None:
    rows = "".join(json.dumps({"input": f"refund number {n}"}) + "\n" for n in range(4))
    (tmp_path / "refunds.jsonl").write_text(rows, encoding="utf-8")
    home = tmp_path / "home"
    with Workshop(home, load_encoder()) as workshop:
        request = RegisterTask("refunds", tmp_path / "refunds.jsonl", with_prompt=False)
        assert not register(workshop, [request], None, TuningSettings()).failures
    program = (
        "import pathlib, sys; from router.bootstrap import open_router;"
        "from router.settings import ServerSettings;"
        f"settings = ServerSettings(home=pathlib.Path({str(home)!r}), base_model=None)\n"
        "with open_router(settings): print(*sys.modules)"
    )
    found = run_python(program).split()
    assert "router.loading" in found
    assert {"scipy", "sklearn", "torch", "router.compiling"}.isdisjoint(found)


def test_a_server_without_traces_does_not_import_opentelemetry() -> None:
    found = run_python("import router.server, router.bootstrap, sys; print(*sys.modules)").split()
    assert not any(name.startswith("opentelemetry") for name in found)


def test_only_one_module_knows_opentelemetry() -> None:
    found = [
        name_of(path)
        for path in modules("router", "trainer")
        if any(name.startswith("opentelemetry") for name in imports_of(path))
    ]
    assert found == ["router/tracing.py"]


def test_what_is_refused_at_once_needs_no_model() -> None:
    found = run_python("import trainer.admission, sys; print(*sys.modules)").split()
    assert {"torch", "transformers", "onnxruntime", "faiss", "sklearn"}.isdisjoint(found)


@pytest.mark.parametrize("module", ["trainer.register", "trainer.evaluate_stream"])
def test_what_registers_tasks_without_prompts_loads_no_torch(module: str) -> None:
    found = run_python(f"import {module}, sys; print(*sys.modules)").split()
    assert {"torch", "transformers"}.isdisjoint(found)


def test_a_task_of_few_rows_is_registered_without_waiting_for_what_others_need() -> None:
    found = run_python("import trainer.register, sys; print(*sys.modules)").split()
    assert {"sklearn", "scipy.stats"}.isdisjoint(found)


def test_serving_with_the_embedded_encoder_loads_no_torch() -> None:
    program = (
        "from router.bootstrap import load_encoder; load_encoder().encode(['a']);"
        "import sys; print(*sys.modules)"
    )
    found = run_python(program).split()
    assert "onnxruntime" in found
    assert {"torch", "transformers", "sentence_transformers", "sklearn"}.isdisjoint(found)


def test_only_the_places_meant_for_it_name_concrete_backends() -> None:
    offenders = []
    for path in modules("router", "trainer"):
        name = name_of(path)
        if name.startswith(NAMES_BACKENDS):
            continue
        backends = {found for found in imports_of(path) if found.startswith("router.backends")}
        if name in NAMES_TORCH_MODEL:
            backends -= {
                found
                for found in backends
                if found.startswith("router.backends.torch_model")
                or found.startswith("router.backends.rows")
            }
            backends.discard("router.backends")
        if backends:
            offenders.append((name, sorted(backends)))
    assert offenders == []


def test_only_the_indexes_import_faiss() -> None:
    found = [name_of(p) for p in modules("router", "trainer") if "faiss" in set(imports_of(p))]
    assert found == [
        f"router/{name}.py" for name in ("approximate_index", "index", "quantised_index")
    ]


def test_only_backends_and_tuning_import_torch() -> None:
    allowed = (*NAMES_BACKENDS, *NAMES_TORCH_MODEL)
    offenders = [
        name_of(path)
        for path in modules("router", "trainer")
        if "torch" in set(imports_of(path)) and not name_of(path).startswith(allowed)
    ]
    assert offenders == []


def test_only_the_catalog_speaks_sqlite() -> None:
    found = [name_of(p) for p in modules("router", "trainer") if "sqlite3" in set(imports_of(p))]
    assert found == ["router/catalog.py", "trainer/catalog_writer.py"]


def test_the_command_answers_before_anything_heavy_is_loaded() -> None:
    for path in modules("trainer/cli"):
        assert imports_at_the_top(path).isdisjoint(HEAVY), name_of(path)
    found = run_python("import trainer.cli, sys; print(*sys.modules)").split()
    assert {"torch", "transformers", "onnxruntime", "faiss"}.isdisjoint(found)


def test_nobody_prints_but_the_command_and_the_scripts() -> None:
    offenders = [
        f"{name_of(path)}:{node.lineno}"
        for path in modules("router", "trainer")
        if not name_of(path).startswith(("trainer/cli/", "trainer/base_model/"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "pprint", "input", "breakpoint")
    ]
    assert offenders == []


def test_every_module_can_be_read_in_one_sitting() -> None:
    long = {
        name_of(path): lines
        for path in modules("router", "trainer")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert long == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}
    named = {path.stem for path in modules("router", "trainer")} & empty
    assert named == set()


def test_tests_are_never_skipped() -> None:
    marks = ("pytest.skip", "mark.skip", "skipif", "xfail", "importorskip")
    offenders = [
        name_of(path)
        for path in modules("tests")
        if path != Path(__file__)
        and any(mark in path.read_text(encoding="utf-8") for mark in marks)
    ]
    assert offenders == []
