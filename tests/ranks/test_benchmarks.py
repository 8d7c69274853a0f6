"""Test that the benchmarks can be imported without optional packages, and that those of a GPU run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sweeps
from benchmarks.cores import on_all_cores
from benchmarks.gpu import host, run, step
from benchmarks.gpu.run import PAGE, PARTS, ROOT, kept_sections, main, page
from benchmarks.gpu.turns import MEASURE_S, Bench, table, take_turns
from benchmarks.tables import markdown
from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks

EXTRAS = ("accelerate", "deepspeed", "lightning", "transformers")


@pytest.mark.parametrize("module", ["benchmarks.__main__", "tests.faults.__main__"])
def test_benchmarks_are_imported_without_the_extras(tmp_path: Path, module: str) -> None:
    def body(world: World) -> str:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", *EXTRAS)]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(EXTRAS))  # type: ignore[arg-type]
        known = metadata.version

        def version(name: str) -> str:
            if name in EXTRAS:
                raise metadata.PackageNotFoundError(name)
            return known(name)

        metadata.version = version
        return import_module(module).__name__

    assert in_ranks(1, body, tmp_path) == [module]


def test_jobs_run_on_all_cores_and_a_failure_is_shown() -> None:
    def job(number: int) -> Any:
        return lambda folder: [number, [path.name for path in folder.iterdir()]]

    assert on_all_cores([job(number) for number in range(5)]) == [[number, []] for number in range(5)]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        on_all_cores([job(0), job(1), lambda folder: 1 / 0])


def test_steps_and_trace_of_a_gpu_run_dry(tmp_path: Path) -> None:
    def body(world: World) -> list[list[dict[str, object]]]:
        bench = Bench(world, dry=True, began=time.perf_counter())
        return [[*rounds(bench)][-1] for rounds in (step.gpt2, host.trace)]

    (steps, traced), *_ = in_ranks(1, body, tmp_path)
    assert [row[""] for row in steps][:2] == [step.OURS, step.BARE]
    assert all(row["ms per step"] > 0 and row[f"/ {step.BARE}"] > 0 for row in steps)
    assert traced[0]["waits per step"] == "none"


def test_late_loops_are_left_out_and_a_failure_keeps_the_rounds_before_it(tmp_path: Path) -> None:
    def body(world: World) -> list[dict[str, object]]:
        late = Bench(world, dry=False, began=time.perf_counter() - MEASURE_S)
        rounds = take_turns(late, {name: lambda: lambda: 1.0 for name in "abc"})
        *_, measured = rounds
        left = [1.0, 1.0]  # to warm up, and for a round
        rounds = take_turns(Bench(world, dry=False, began=time.perf_counter()), {"a": lambda: left.pop})
        kept = next(rounds)
        with pytest.raises(IndexError):
            next(rounds)
        return [*table(measured, 1, ("b", "c")), *table(kept, 1, ())]

    (rows,) = in_ranks(1, body, tmp_path)
    assert [row["turns"] for row in rows] == [2, 2, "", 1]
    assert "no time left" in rows[2]["ms per step"]
    assert "/ b" in rows[0]
    assert "/ c" not in rows[0]


def test_a_part_that_is_stopped_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"rows": [{"": "ours"}], "rounds": 3, "where": "here"}
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{json.dumps(found)}' > ${{5#--result=}}\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(run, "LIMIT_S", 2)
    text = run.section("gpt2", run.measured("gpt2", dry=False), dry=False)
    assert "| ours |" in text
    assert "2 s, after 3 rounds" in text


def test_dry_run_of_a_gpu_writes_nothing() -> None:
    before = PAGE.read_text()
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "optimizers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LAMB, ours" in done.stdout
    assert "dry run" in done.stdout
    assert PAGE.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on the GPU")
def test_benchmark_of_a_gpu_ends_without_one() -> None:
    with pytest.raises(SystemExit, match="--dry-run"):
        main([])


def test_page_of_a_gpu_has_each_part() -> None:
    assert PAGE.read_text() == page(kept_sections())
    measured = "## A ResNet-50\n\nMeasured.\n"
    assert page({PARTS["resnet"].title: measured}).count(measured) == 1


def test_the_table_of_sweeps_is_that_of_the_kept_reports() -> None:
    kept = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks/reports").glob("*/report.json"))]
    table = markdown([row for report in kept for row in sweeps._rows_of(report)])
    assert table in (ROOT / "benchmarks/results.md").read_text()


def test_a_sweep_without_a_value_has_a_dash() -> None:
    group = {"task": "a", "global_size": 16, "lr_peak": 0.1, "runs": [], "left_out": {"not-scaled/seed=0": "diverged"}}
    values = {"last": None, "epoch_s": None, "gradient_variance": {"mean": 2.0}}
    (row,) = sweeps._rows_of({"groups": [group | values]})
    assert list(row.values()) == ["a", "not scaled", 16, 0.1, "—", "—", 2.0]


@pytest.mark.parametrize("report", ["images", "mnist1d"])
def test_kept_reports_list_the_files_that_are_kept(report: str) -> None:
    folder = ROOT / "benchmarks/reports" / report
    listed = json.loads((folder / "report.json").read_text())["files"]
    assert sorted(listed) == sorted(file.name for file in folder.iterdir())
