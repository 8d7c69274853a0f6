"""Test ``action=tune`` end to end: what it measures, recommends and leaves, also when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isobatch.conf.compose import compose
from tests.support.warm import Warm

ROOT = Path(__file__).parents[2]
SMALL = ("task=digits", "device=cpu", "task.args.width=8", "duration=2ep")
NOISE = ("action=tune", "tune.parts=[noise]", "tune.samples=20st", *SMALL)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def launch(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Return stdout and stderr of a command."""
    process = Warm(list(arguments), Path.cwd(), dict(os.environ))
    out, err = process.communicate(timeout=120)
    assert process.wait() == code, f"{out}\n{err}"
    return out, err


def stored(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "tune/tune.json").read_text())
    return found


def test_it_recommends_a_batch_by_speed_and_noise_whose_command_trains() -> None:
    out, _ = launch("action=tune", "tune.parts=[speed,noise]", "tune.samples=20st", *SMALL, "run.dir=run")
    found = stored("run")
    recommended = found["recommendation"]
    words = recommended["command"].split()
    assert recommended["command"] in out
    assert {"tune.json", "tune.png", "tune.svg"} <= {*os.listdir("run/tune")}
    sizes = [row["per_gpu"] for row in found["speed"]["sizes"]]
    assert sizes == [1, 2, 4, 8, 16, 32, 64][: len(sizes)]
    assert found["noise"]["measurements"] == 20
    config = compose([word for word in words if "=" in word])
    assert (config.action, config.batch.global_size) == ("train", recommended["global_size"])
    predicted = recommended["samples"]
    assert config.duration.value == (2 if abs(predicted / 2874 - 1) < 0.01 else round(predicted))
    assert config.task.args["width"] == 8
    assert not {*os.listdir("run")} - {"tune"}  # nothing of a run


def test_results_are_used_again_unless_the_run_changes() -> None:
    first = stored_after(*NOISE, "run.dir=run")
    out, _ = launch(*NOISE, "run.dir=run")
    assert "noise: measured before" in out
    assert stored("run") == first
    out, _ = launch(*NOISE, "run.dir=run", "batch.global_size=48")
    assert "measured before" not in out


def test_a_speed_from_a_busy_machine_is_measured_again() -> None:
    timed = ("action=tune", "tune.parts=[speed]", *SMALL, "batch.per_gpu=2", "run.dir=run")
    found = stored_after(*timed)
    for spread, again in ((0.1, False), (0.3, True)):
        found["speed"]["spread"] = spread
        Path("run/tune/tune.json").write_text(json.dumps(found))
        out, _ = launch(*timed)
        assert ("speed: measured before" not in out) == again
    found["speed"]["spread"] = 0.6
    Path("run/tune/tune.json").write_text(json.dumps(found))
    _, err = launch(*NOISE, "batch.per_gpu=2", "run.dir=run", "tune.max_step_ms=100", code=2)
    assert "add speed to tune.parts" in err


def stored_after(*arguments: str) -> dict[str, Any]:
    launch(*arguments)
    return stored("run")


def test_json_is_the_content_of_the_file_and_the_same_on_other_ranks() -> None:
    out, _ = launch(*NOISE, "run.dir=run", "output=json")
    assert json.loads(out) == stored("run")


def test_a_reader_that_stops_reading_is_no_crash() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        process = Warm([*NOISE, "run.dir=run"], Path.cwd(), dict(os.environ), output)
        assert process.wait(120) == 0
    assert "recommendation" in stored("run")


def test_what_was_measured_under_other_conditions_isnt_part_of_the_answer() -> None:
    first = stored_after(*NOISE, "run.dir=run")
    out, _ = launch(*NOISE, "run.dir=run", "tune.parts=[memory]", "tune.samples=21st", "output=json")
    assert json.loads(out).keys() == {"memory"}
    assert stored("run") == {"noise": first["noise"], **json.loads(out)}  # kept, in case it is asked for again


def test_the_law_follows_the_batch_that_was_tuned() -> None:
    law = ("action=tune", "tune.parts=[law]", "task=text", "device=cpu", "duration=1000sa", "run.dir=run")
    batches = []
    for samples in (1000, 1_000_000):
        launch(*law, "optimizer=adamw", f"task.tuned.adamw.samples={samples}")
        batches.append(stored("run")["law"]["batch"])
    assert batches[0] > 2 * batches[1]


def test_an_interrupted_part_leaves_the_parts_before_it_and_the_command_resumes() -> None:
    long = ("action=tune", "tune.parts=[noise,lr]", "tune.samples=2000ep", *SMALL[:3], "duration=5000ep", "run.dir=run")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (Path("run/tune/lock").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "the same command resumes" in err
    assert not Path("run/tune/tune.json").exists()
    assert not [name for name in os.listdir("run/tune") if name.startswith(".")]  # nothing half-written, no owner


def test_a_run_trains_in_a_directory_that_was_tuned_and_is_tuned_afterwards_with_the_noise_of_its_training() -> None:
    launch(*NOISE, "run.dir=run")
    launch(*SMALL, "run.dir=run", "duration=2ep", "noise.every=1st", "noise.parts=2", "log.every=1st")
    before = Path("run/metrics.jsonl").read_bytes()
    launch("action=tune", "tune.parts=[noise]", "tune.samples=20st", "run.dir=run")
    recommended = stored("run")["recommendation"]
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert "run.dir=run run.new=true" in recommended["command"]
    assert "noise in training" in recommended["agreement"]
    launch(*NOISE, "init_from=run", "lr.peak=0.02")
    (other,) = Path("runs").iterdir()
    assert "noise in training" not in stored(str(other))["recommendation"]["agreement"]  # it is of another recipe


def test_each_run_of_a_sweep_is_tuned_in_its_own_directory() -> None:
    out, _ = launch("-m", *NOISE, "batch.global_size=32,64", "run.dir=sweep")
    for batch in (32, 64):
        assert stored(f"sweep/batch.global_size={batch}")["noise"]["measurements"] == 20
    assert "noise scale" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("tune.parts=[speed]", "tune.max_step_ms=1e-6"), "tune.max_step_ms=1e-06"),
        (("tune.parts=[]",), "tune.parts"),
        (("tune.parts=[speeed]",), "speed"),
        (("tune.margin=1",), "tune.margin"),
        (("cluster=slurm", "cluster.gpus_per_node=1"), "action=tune"),
    ],
)
def test_what_cant_be_tuned_is_rejected(arguments: tuple[str, ...], named: str) -> None:
    _, err = launch("action=tune", *SMALL, *arguments, code=2)
    assert named in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("parts", "more", "named"),
    [
        ("memory,law", (), "tune.parts has law"),
        ("memory,lr", ("tune.samples=99st",), "tune.samples=100st"),
        ("memory,noise", ("batch.global_size=1",), "can't be halved"),
        ("memory,noise", ("tune.samples=5st",), "tune.samples=11st"),
        ("memory,branch", (), "no checkpoint to branch off"),
        ("memory,sharpness", (), "train the run first"),
        ("memory", ("tune.max_step_ms=100",), "add speed to tune.parts"),
    ],
)
def test_what_will_fail_is_rejected_before_anything_is_measured(parts: str, more: tuple[str, ...], named: str) -> None:
    _, err = launch("action=tune", *SMALL, f"tune.parts=[{parts}]", *more, "run.dir=run", code=2)
    assert named in err
    assert not Path("run/tune/tune.json").exists()


def test_a_damaged_file_is_rejected() -> None:
    Path("run/tune").mkdir(parents=True)
    Path("run/tune/tune.json").write_text("{")
    _, err = launch(*NOISE, "run.dir=run", code=2)
    assert "run/tune/tune.json is damaged" in err


def test_a_run_too_short_for_the_measurements_is_measured_all_the_same() -> None:
    """The steps of a measurement aren't those of the run, and nor is its schedule."""
    short = ("task=digits", "device=cpu", "task.args.width=8", "duration=3st", "lr.warmup=2st", "evaluate.every=1st")
    launch("action=tune", "tune.parts=[memory,speed]", *short, "run.dir=run")
    found = stored("run")
    assert found["speed"]["conditions"]["sizes_to"] == found["memory"]["per_gpu"] > 64
    assert found["memory"]["per_gpu"] >= found["speed"]["sizes"][-1]["per_gpu"]
    assert len(found["speed"]["sizes"]) >= 3


def test_nothing_that_doesnt_fit_is_timed() -> None:
    out, err = launch(
        "action=tune", "tune.parts=[memory,speed]", "cluster.memory_gb=0.05", *SMALL, "run.dir=run", code=2
    )
    assert "nothing fits" in out
    assert "weights, gradients and optimizer state need" in out
    assert stored("run")["memory"]["outlook"]["per_gpu"] == 0
    assert "no step to time" in err
    assert "speed" not in stored("run")


def test_results_of_other_hardware_arent_used_for_a_recommendation() -> None:
    launch("action=tune", "tune.parts=[speed]", *SMALL, "run.dir=run")
    launch(*NOISE, "run.dir=run", "cluster.gpus_per_node=2")
    assert stored("run")["recommendation"]["step_ms"] is None


def test_the_noise_of_a_finished_run_is_measured_before_its_end() -> None:
    launch(*SMALL, "run.dir=run", "checkpoint.keep_every=25%")
    launch("action=tune", "tune.parts=[noise]", "tune.samples=22st", "init_from=run")
    found = stored("run")
    assert found["noise"]["measurements"] > 10
    assert len(found["noise"]["course"]) > 1
    assert "/run run.new=true" in found["recommendation"]["command"]
    launch("action=tune", "tune.parts=[noise]", "tune.samples=22st", "init_from=run", *SMALL, "lr.peak=0.05")
    assert stored("run") == found  # a fine-tune's results are its own
    (own,) = Path("runs").iterdir()
    assert len(found["noise"]["course"]) < 5 < len(stored(str(own))["noise"]["course"])  # at checkpoints, and along it
    command = stored(str(own))["recommendation"]["command"]
    assert "init_from=run" in command
    assert "run.dir" not in command
    _, err = launch("action=tune", "tune.parts=[noise]", "tune.samples=22st", "init_from=run/final", code=2)
    assert "checkpoint.keep_every=10%" in err


def test_a_given_peak_is_carried_by_the_rule_too() -> None:
    launch(*NOISE, "run.dir=run", "lr.peak=0.2")
    found = stored("run")["recommendation"]
    assert found["lr"] == pytest.approx(0.2 * found["global_size"] / 64)
    assert f"lr.peak={found['lr']:.6g}" in found["command"]
    assert any("wasn't tried" in note for note in found["notes"]) == (found["lr"] > 0.2)


def test_a_recommended_lr_is_at_most_the_largest_stable_one() -> None:
    """A peak of 3 diverges at a batch of 64; the linear rule carries it and the largest stable LR alike."""
    launch(*NOISE, "run.dir=run", "tune.parts=[noise,lr]", "tune.samples=100st", "lr.peak=3", "lr.rule=linear")
    found = stored("run")["recommendation"]
    stable = stored("run")["lr"]["largest_stable"]
    assert stable < 3
    assert found["lr"] == pytest.approx(stable * found["global_size"] / 64)
    assert f"not {3 * found['global_size'] / 64:.3g}: the range test was stable up to {stable:.3g}" in found["notes"][0]
    assert f"lr.peak={found['lr']:.6g}" in found["command"]


def test_a_batch_schedule_is_compared_with_one_batch_and_what_wasnt_compared_is_said() -> None:
    schedule = "batch.schedule='0sa:16 50%:32'"
    out, _ = launch(
        "action=tune",
        "tune.parts=[speed,noise]",
        "tune.samples=60st",
        *SMALL,
        schedule,
        "batch.per_gpu=2",
        "run.dir=run",
    )
    found = stored("run")["recommendation"]
    assert "batch.schedule" not in found["command"]
    assert any(note.startswith("batch.schedule takes 16 to 32 samples, 21 on average") for note in found["notes"])
    assert not [note for note in found["notes"] if note not in out]
    limits = ("best may lie", "weren't timed", "the speed isn't known")  # the last one on a busy machine
    assert any(limit in note for limit in limits for note in found["notes"])
