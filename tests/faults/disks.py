"""Rows of the fault table: full disks, damaged checkpoints, changed data."""

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


SAID = "No space left|File too large"


@contextmanager
def filling(case: Case, leave: int, at: str = "step", call: int = 18) -> Iterator[list[Fault]]:
    """Yield faults that fill the disk of the run directory, except for ``leave`` bytes, from a call of the task on.

    The output of the commands is on that disk, too. Only root can mount a small disk; for other users the size of the
    ranks' files is limited instead.
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


@row("the disk is full but for 1 MB, in two saves; checkpoint.on_error=continue; then SIGKILL of all", everywhere=True)
def full(case: Case, _: References) -> None:
    with filling(case, 1 << 20) as faults:
        command = case.start(faults=faults, **SLOWLY)
        case.await_step(36)
        check([path.name for path in case.checkpoints()] == ["step-00000010"], f"{case.checkpoints()}")
        command.kill(command.everyone())
        case.ended(command, None, -9)
        warnings = [event["text"] for event in case.events("warning")]
        check(len(warnings) == 2 and all(re.search(SAID, text) for text in warnings), f"{warnings}")
        case.causes += warnings
    case.goes_on()
    check(case.event("going_on")["step"] == 10, "it didn't go on from the older one")


@row("the disk is full to the last byte, and its output goes there, too; checkpoint.on_error=stop")
def full_to_the_last_byte(case: Case, _: References) -> None:
    with filling(case, 0) as faults:
        command = case.start("checkpoint.on_error=stop", faults=faults, **SLOWLY)
        case.crashed(command, f"at which to stop, can't be saved.*({SAID})")
    case.goes_on("checkpoint.on_error=stop")
    check(case.event("going_on")["step"] == 10, "it didn't go on from the older one")


@row("the disk is full but for 1 MB when final/ is written")
def full_at_the_end(case: Case, _: References) -> None:
    with filling(case, 1 << 20, "evaluation", 14) as faults:  # the last one of each rank
        command = case.start(faults=faults)
        case.crashed(command, f"^the trained weights can't be written to .*/final .*({SAID}).*run the same command")
        check(not list(case.run.glob("final*")), "there is something of final/")
    case.goes_on()
    check(case.event("going_on")["step"] == STEPS, "steps were done again")


@row("the disk is full but for 1 MB in the last save; checkpoint.on_error=stop")
def full_in_the_last_save(case: Case, _: References) -> None:
    with filling(case, 1 << 20, call=STEPS) as faults:
        command = case.start("checkpoint.on_error=stop", faults=faults)
        case.crashed(command, f"^step {STEPS}, at which to end, can't be saved.*({SAID})")
    case.goes_on("checkpoint.on_error=stop")
    check(case.event("going_on")["step"] == 40, "it didn't go on from the older one")


section("Checkpoints that can't be used")


EVERYWHERE = ("one bit of a tensor is flipped", "a rank's file is missing")


def damaged(done: str, case: Case, references: References) -> None:
    damage, said = DAMAGES[done]
    case.begin_as(references("stopped"))
    damage(case.checkpoints()[-1])
    case.finished(case.start())
    case.causes.append(case.event("skipped", text=f"^checkpoint step-00000045 is skipped: .*{said}")["text"])
    check(case.event("going_on")["step"] == 40, "it didn't go on from the one before")
    check((case.run / "checkpoints/passed-over/step-00000045").is_dir(), "it wasn't kept")
    check(not (case.folder / "unpickled").exists(), "it was unpickled")


for done in DAMAGES:
    row(f"the newest one: {done}", everywhere=done in EVERYWHERE)(partial(damaged, done))


@row("the newest one: a rank's file is missing for one start, which is killed, and is there again for the next")
def missing_for_a_while(case: Case, references: References) -> None:
    case.begin_as(references("stopped"))
    file, away = case.checkpoints()[-1] / "rank-00001.safetensors", case.folder / "away"
    file.rename(away)
    command = case.start(DELAY_S="0.2")
    wait_until(lambda: 40 < case.metrics()[-1]["step"] < 45, "a step after the 40th")
    command.kill(command.everyone())
    case.ended(command, None, -9)
    case.causes.append(case.event("skipped", text=" is skipped: rank-00001.safetensors is missing")["text"])
    (back,) = (path.parent for path in case.run.rglob("step-00000045/manifest.json"))
    away.rename(back / file.name)
    case.goes_on()
    check([event["step"] for event in case.events("going_on")] == [40, 40], "it went back to it")


@row("the newest one was moved away and linked back, and final/ is a link: both are used, and stay links")
def linked(case: Case, references: References) -> None:
    case.begin_as(references("stopped"))
    newest, final = case.checkpoints()[-1], case.run / "final"
    for link, away in ((newest, case.folder / "away"), (final, case.folder / "weights")):
        if link == newest:
            newest.rename(away)
        link.symlink_to(os.path.relpath(away, link.parent))
    case.goes_on()
    check(case.event("going_on")["step"] == 45, "it wasn't used")
    check(newest.is_symlink() and (newest / "manifest.json").exists(), "it was removed")
    check(final.is_symlink() and any(final.iterdir()), "final/ isn't the link any more")


@row("all of them are damaged: refused; then one is mended")
def none_good(case: Case, references: References) -> None:
    case.begin_as(references("stopped"))
    folder, mended = case.run / "checkpoints", case.checkpoints()[0] / "manifest.json"
    good = mended.read_bytes()
    for path in case.checkpoints():
        os.truncate(path / "manifest.json", 100)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    case.ended(case.start(), "refused", 2, "no checkpoint in .* is good .*run.new=true")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check(before == after, "something was overwritten")
    mended.write_bytes(good)
    case.goes_on()


@row("all of them are gone: refused; then they are brought back")
def none_there(case: Case, references: References) -> None:
    case.begin_as(references("stopped"))
    folder, away = case.run / "checkpoints", case.folder / "away"
    folder.rename(away)
    folder.mkdir()
    case.ended(case.start(), "refused", 2, "checkpoints has no checkpoint, but step 45 was saved there; restore it")
    check(not any(folder.iterdir()), "something was saved there")
    folder.rmdir()
    away.rename(folder)
    case.goes_on()


@row("other data (one sample less, data.fingerprint=false): refused; then the old data again")
def less_data(case: Case, references: References) -> None:
    case.begin_as(references("stopped"))
    cause = f"the training data has {SAMPLES - 1} samples, but had {SAMPLES} when step-00000045 was saved"
    case.ended(case.start(SAMPLES=str(SAMPLES - 1)), "refused", 2, cause)
    case.goes_on()


@row("other data (as many samples, other values): refused; then the old data again")
def other_data(case: Case, _: References) -> None:
    case.counted = False  # the fingerprint looks at samples, too
    base = (*BASE, "data.fingerprint=true")
    case.stopped(case.start(base=base, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    cause = "the training data has changed: its fingerprint is .*, but was "
    case.ended(case.start(base=base, SHIFT="1"), "refused", 2, cause)
    case.goes_on(base=base)
