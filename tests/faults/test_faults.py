"""Run some rows of the fault table, and test that rows detect the differences they check for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import crashes, disks, stops  # noqa: F401  they fill the table
from tests.faults.case import APART, WARM, Broken, Case
from tests.faults.table import ROWS, References
from tests.support.same import ENGINES


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WARM, "1")
        yield


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], References]:
    """Return a function that gives the references of an engine."""
    return cache(lambda engine: References(tmp_path_factory.mktemp("references"), ENGINES[engine]))


@pytest.fixture(scope="module")
def references(on: Callable[[str], References]) -> References:
    return on("DDP")


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("DDP", "TERM in mid-epoch; resumes on fewer ranks"),
        ("DDP", "SIGKILL of the launcher"),
        ("DDP", "rank 0 raises an exception; restarted"),
        ("ZeRO-3", "SIGKILL of rank 0; restarted"),
        ("DDP", "the newest: a pickle named as safetensors, with the right checksum"),
        ("FSDP", "the newest: a rank's file is missing"),
    ],
)
def test_row_holds(engine: str, fault: str, on: Callable[[str], References], tmp_path: Path) -> None:
    (row,) = (row for rows in ROWS.values() for row in rows if row.fault == fault)
    cells = row(tmp_path / "row", on(engine))
    assert (cells["lost"], cells["repeated"], cells["orphans"]) == ("0", "0", "0")


@pytest.fixture
def undisturbed(references: References, tmp_path: Path) -> Case:
    case = Case(tmp_path / "undisturbed")
    case.copy_from(references("plain"))
    assert case.compare(references("plain"))[APART] == "0 (bitwise)"
    return case


def test_lost_and_repeated_samples_are_counted(undisturbed: Case, references: References) -> None:
    file = max((undisturbed.folder / "fetched-0").iterdir())
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows[:50], *rows[53:], rows[9], rows[9]]))
    assert undisturbed.count_samples() == (3, 2, 0)
    with pytest.raises(Broken, match="3 samples lost, 2 repeated"):
        undisturbed.compare(references("plain"))


def test_weights_are_compared_bitwise_or_up_to_rounding(undisturbed: Case, references: References) -> None:
    weights = undisturbed.weights()
    weights["model/0.weight"][0, 0] = torch.nextafter(weights["model/0.weight"][0, 0], torch.tensor(9.0))
    save(weights, undisturbed)
    with pytest.raises(Broken, match=r"max \|Δ\|"):
        undisturbed.compare(references("plain"))
    undisturbed.exact = False
    assert undisturbed.compare(references("plain"))[APART] != "0 (bitwise)"
    weights["model/0.weight"][0, 0] += 1e-4
    save(weights, undisturbed)
    with pytest.raises(Broken, match=r"max \|Δ\|"):
        undisturbed.compare(references("plain"))


def save(weights: dict[str, torch.Tensor], case: Case) -> None:
    plain = {name.removeprefix("model/"): tensor for name, tensor in weights.items()}
    save_file(plain, case.run / "final/model.safetensors")


def test_optimizer_state_is_compared_bitwise(undisturbed: Case, references: References) -> None:
    file = undisturbed.checkpoints()[-1] / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Broken, match="the last checkpoint"):
        undisturbed.compare(references("plain"))


@pytest.mark.parametrize("exact", [True, False])
def test_metrics_are_compared_line_by_line(undisturbed: Case, references: References, exact: bool) -> None:
    undisturbed.exact = exact
    file = undisturbed.run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for other in (lines[:9] + lines[10:], [*lines[:9], lines[8], *lines[9:]]):
        file.write_text("".join(other))
        with pytest.raises(Broken, match=r"metrics\.jsonl"):
            undisturbed.compare(references("plain"))
