"""Define rows of the fault table: full disks, damaged checkpoints, changed data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tests.faults.case import BASE, SLOWLY, STEPS, Case, check, wait_until
from tests.faults.hostile import DAMAGES
from tests.faults.table import References, row, section, signalled
from tests.faults.task import SAMPLES, Fault, fault

section("Full disks")


DISK_FULL = "No space left|File too large"


@contextmanager
def filling(case: Case, leave: int, at: str = "step", call: int = 18) -> Iterator[list[Fault]]:
    """Yield faults that fill the disk of the run directory at a call of the task, except for ``leave`` bytes.

    The commands' output is on that disk, too. Only root can mount a small disk; for other users the size of the ranks'
    files is limited instead.
    """
    disk = case.folder / "disk"
    disk.mkdir()
    case.run = disk / "run"
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield [fault("limit", at, call, rank, leave=max(leave, 1 << 16)) for rank in (0, 1)]
        return
    try:
        yield [fault("fill", at, call, path=str(disk / "ballast"), leave=leave)]
        (disk / "ballast").unlink()
        shutil.copytree(disk, case.folder / "kept", symlinks=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    disk.rmdir()
    (case.folder / "kept").rename(disk)


@row(
    "the disk is full except for 1 MB, in two saves; checkpoint.on_error=continue; then SIGKILL of all", everywhere=True
)
def full(case: Case, _: References) -> None:
    with filling(case, 1 << 20) as faults:
        command = case.start(faults=faults, **SLOWLY)
        case.await_step(36)
        check([path.name for path in case.checkpoints()] == ["step-00000010"], f"{case.checkpoints()}")
        command.kill(command.pids())
        case.expect_end(command, None, -9)
        warnings = [event["text"] for event in case.events("warning")]
        check(len(warnings) == 2 and all(re.search(DISK_FULL, text) for text in warnings), f"{warnings}")
        case.causes += warnings
    case.run_to_end()
    check(case.event("going_on")["step"] == 10, "it didn't resume from the older checkpoint")


@row("the disk is full to the last byte, and holds the output, too; checkpoint.on_error=stop")
def full_to_the_last_byte(case: Case, _: References) -> None:
    with filling(case, 0) as faults:
        command = case.start("checkpoint.on_error=stop", faults=faults, **SLOWLY)
        case.expect_crash(command, f"at which to stop, can't be saved.*({DISK_FULL})")
    case.run_to_end("checkpoint.on_error=stop")
    check(case.event("going_on")["step"] == 10, "it didn't resume from the older checkpoint")


@row("the disk is full except for 1 MB when final/ is written")
def full_at_the_end(case: Case, _: References) -> None:
    with filling(case, 1 << 20, "evaluation", 14) as faults:  # each rank's last evaluation
        command = case.start(faults=faults)
        case.expect_crash(
            command, f"^the trained weights can't be written to .*/final .*({DISK_FULL}).*run the same command"
        )
        check(not list(case.run.glob("final*")), "final/ exists in part")
    case.run_to_end()
    check(case.event("going_on")["step"] == STEPS, "steps were repeated")


@row("the disk is full except for 1 MB in the last save; checkpoint.on_error=stop")
def full_in_the_last_save(case: Case, _: References) -> None:
    with filling(case, 1 << 20, call=STEPS) as faults:
        command = case.start("checkpoint.on_error=stop", faults=faults)
        case.expect_crash(command, f"^step {STEPS}, at which to end, can't be saved.*({DISK_FULL})")
    case.run_to_end("checkpoint.on_error=stop")
    check(case.event("going_on")["step"] == 40, "it didn't resume from the older checkpoint")


section("Checkpoints that can't be used")


EVERYWHERE = ("one bit of a tensor is flipped", "a rank's file is missing")


def damaged(name: str, case: Case, references: References) -> None:
    damage, expected = DAMAGES[name]
    case.copy_from(references("stopped"))
    damage(case.checkpoints()[-1])
    case.expect_recovery(case.start())
    case.causes.append(case.event("skipped", text=f"^checkpoint step-00000045 is skipped: .*{expected}")["text"])
    check(case.event("going_on")["step"] == 40, "it didn't resume from the previous checkpoint")
    check((case.run / "checkpoints/passed-over/step-00000045").is_dir(), "the damaged checkpoint wasn't kept")
    check(not (case.folder / "unpickled").exists(), "the damaged checkpoint was unpickled")


for name in DAMAGES:
    row(f"the newest: {name}", everywhere=name in EVERYWHERE)(partial(damaged, name))


@row("the newest: a rank's file is missing at one start, which is killed, and is back at the next")
def missing_for_a_while(case: Case, references: References) -> None:
    case.copy_from(references("stopped"))
    file, away = case.checkpoints()[-1] / "rank-00001.safetensors", case.folder / "away"
    file.rename(away)
    command = case.start(DELAY_S="0.2")
    wait_until(lambda: 40 < case.metrics()[-1]["step"] < 45, "a step after the 40th")
    command.kill(command.pids())
    case.expect_end(command, None, -9)
    case.causes.append(case.event("skipped", text=" is skipped: rank-00001.safetensors is missing")["text"])
    (newest,) = (path.parent for path in case.run.rglob("step-00000045/manifest.json"))
    away.rename(newest / file.name)
    case.run_to_end()
    check([event["step"] for event in case.events("going_on")] == [40, 40], "it resumed from the skipped checkpoint")


@row("the newest was moved away and linked back, and final/ is a link: both are used, and stay links")
def linked(case: Case, references: References) -> None:
    case.copy_from(references("stopped"))
    newest, final = case.checkpoints()[-1], case.run / "final"
    for link, away in ((newest, case.folder / "away"), (final, case.folder / "weights")):
        if link == newest:
            newest.rename(away)
        link.symlink_to(os.path.relpath(away, link.parent))
    case.run_to_end()
    check(case.event("going_on")["step"] == 45, "the linked checkpoint wasn't used")
    check(newest.is_symlink() and (newest / "manifest.json").exists(), "the linked checkpoint was removed")
    check(final.is_symlink() and any(final.iterdir()), "final/ is no longer the link")


@row("all are damaged: refused; then one is repaired")
def all_damaged(case: Case, references: References) -> None:
    case.copy_from(references("stopped"))
    folder, repaired = case.run / "checkpoints", case.checkpoints()[0] / "manifest.json"
    good = repaired.read_bytes()
    for path in case.checkpoints():
        os.truncate(path / "manifest.json", 100)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    case.expect_end(case.start(), "refused", 2, "no checkpoint in .* is good .*run.new=true")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check(before == after, "a file was overwritten")
    repaired.write_bytes(good)
    case.run_to_end()


@row("all are gone: refused; then they are restored")
def all_gone(case: Case, references: References) -> None:
    case.copy_from(references("stopped"))
    folder, away = case.run / "checkpoints", case.folder / "away"
    folder.rename(away)
    folder.mkdir()
    case.expect_end(
        case.start(), "refused", 2, "checkpoints has no checkpoint, but step 45 was saved there; restore it"
    )
    check(not any(folder.iterdir()), "the refused command wrote a file")
    folder.rmdir()
    away.rename(folder)
    case.run_to_end()


@row("other data (one sample fewer, data.fingerprint=false): refused; then the old data again")
def fewer_samples(case: Case, references: References) -> None:
    case.copy_from(references("stopped"))
    cause = f"the training data has {SAMPLES - 1} samples, but had {SAMPLES} when step-00000045 was saved"
    case.expect_end(case.start(SAMPLES=str(SAMPLES - 1)), "refused", 2, cause)
    case.run_to_end()


@row("other data (the same number of samples, other values): refused; then the old data again")
def other_data(case: Case, _: References) -> None:
    case.counted = False  # the fingerprint fetches samples, too
    base = (*BASE, "data.fingerprint=true")
    case.expect_stop(case.start(base=base, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    cause = "the training data has changed: its fingerprint is .*, but was "
    case.expect_end(case.start(base=base, SHIFT="1"), "refused", 2, cause)
    case.run_to_end(base=base)
