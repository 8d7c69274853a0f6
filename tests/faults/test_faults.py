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
    """The references of an engine."""
    return cache(lambda engine: References(tmp_path_factory.mktemp("references"), ENGINES[engine]))


@pytest.fixture(scope="module")
def references(on: Callable[[str], References]) -> References:
    return on("DDP")


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("DDP", "TERM in mid-epoch; goes on on fewer ranks"),
        ("DDP", "SIGKILL of the launcher"),
        ("DDP", "rank 0 raises an exception; restarted"),
        ("ZeRO-3", "SIGKILL of rank 0; restarted"),
        ("DDP", "the newest one: a pickle named as safetensors, its checksum right"),
        ("FSDP", "the newest one: a rank's file is missing"),
    ],
)
def test_row(engine: str, fault: str, on: Callable[[str], References], tmp_path: Path) -> None:
    (row,) = (row for rows in ROWS.values() for row in rows if row.fault == fault)
    cells = row(tmp_path / "row", on(engine))
    assert (cells["lost"], cells["repeated"], cells["orphans"]) == ("0", "0", "0")


@pytest.fixture
def whole(references: References, tmp_path: Path) -> Case:
    """An undisturbed run."""
    case = Case(tmp_path / "whole")
    case.begin_as(references("plain"))
    assert case.compared(references("plain"))[APART] == "0 (bitwise)"
    return case


def test_samples_that_are_lost_or_repeated_are_counted(whole: Case, references: References) -> None:
    file = max((whole.folder / "fetched-0").iterdir())
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows[:50], *rows[53:], rows[9], rows[9]]))
    assert whole.counts() == (3, 2, 0)
    with pytest.raises(Broken, match="3 samples lost, 2 repeated"):
        whole.compared(references("plain"))


def test_weights_are_compared_bit_by_bit_or_to_rounding(whole: Case, references: References) -> None:
    weights = whole.weights()
    weights["model/0.weight"][0, 0] = torch.nextafter(weights["model/0.weight"][0, 0], torch.tensor(9.0))
    save(weights, whole)
    with pytest.raises(Broken, match=r"max \|Δ\|"):
        whole.compared(references("plain"))
    whole.exact = False
    assert whole.compared(references("plain"))[APART] != "0 (bitwise)"
    weights["model/0.weight"][0, 0] += 1e-4
    save(weights, whole)
    with pytest.raises(Broken, match=r"max \|Δ\|"):
        whole.compared(references("plain"))


def save(weights: dict[str, torch.Tensor], case: Case) -> None:
    plain = {name.removeprefix("model/"): tensor for name, tensor in weights.items()}
    save_file(plain, case.run / "final/model.safetensors")


def test_the_optimizer_is_compared_bit_by_bit(whole: Case, references: References) -> None:
    file = whole.checkpoints()[-1] / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Broken, match="the last checkpoint"):
        whole.compared(references("plain"))


@pytest.mark.parametrize("exact", [True, False])
def test_lines_of_metrics_are_compared(whole: Case, references: References, exact: bool) -> None:
    whole.exact = exact
    file = whole.run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for other in (lines[:9] + lines[10:], [*lines[:9], lines[8], *lines[9:]]):
        file.write_text("".join(other))
        with pytest.raises(Broken, match=r"metrics\.jsonl"):
            whole.compared(references("plain"))
