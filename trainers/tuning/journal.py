"""Note a size before it is run, so that a start after its process has ended knows of it.

An error says whether memory ran out, and the rank that has it notes that. A process that was killed can't say why. The
kernel counts the processes that it kills for lack of memory; anything else, such as the end of a job, says nothing
about memory. So a size without such a witness is run once more, and counts as too large once its process has ended
twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.reading import Unreadable, read_json
from isobatch.scaling.tuning.memory import HALF, Probe

FILE = "probing.json"
BY_KERNEL = "the kernel killed a process for lack of memory"
TWICE = "the process ended twice while it ran, for an unknown reason"


@dataclass(frozen=True, slots=True)
class Begun:
    """Hold a size that was begun.

    Attributes:
        times: how often, with the earlier starts.
        kills: the kernel's counts before it, see ``meter.oom_kills``.
    """

    per_gpu: int
    times: int
    kills: dict[str, int]


class Journal:
    """The probes of a search that hasn't ended, in a file.

    Args:
        folder: of the file; None: nothing is noted.
        conditions: what the probes depend on; those of others aren't used.
        writes: this rank writes the file; the other ranks only if their memory runs out.

    Attributes:
        file: its path.
        probes: those of the earlier starts and of this one.
    """

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any], *, writes: bool = True) -> None:
        self.file = folder / FILE if folder else None
        self._conditions, self._writes = dict(conditions), writes
        self.probes: list[Probe] = []
        self._begun: Begun | None = None

    def read(self, kills: Mapping[str, int]) -> None:
        """Read the probes of the earlier starts; a damaged file is ignored, since it saves time only.

        Args:
            kills: the kernel's counts now.
        """
        with suppress(FileNotFoundError, Unreadable, TypeError, KeyError, ValueError):
            found = read_json(self.file) if self.file else None
            if isinstance(found, dict) and found["conditions"] == self._conditions:
                self.load(json.dumps(found))
        if begun := self._begun:
            by_kernel = any(kills.get(group, 0) > count for group, count in begun.kills.items())
            if by_kernel or begun.times > 1:
                self.end(Probe(begun.per_gpu, None, BY_KERNEL if by_kernel else TWICE))

    def load(self, text: str) -> None:
        """Take over what ``text`` returned on another rank."""
        found = json.loads(text)
        begun = found["begun"]
        self.probes = [Probe(*values) for values in found["probes"]]
        self._begun = Begun(**begun) if begun else None

    def text(self) -> str:
        """Return the content of the file."""
        probes = [list(asdict(probe).values()) for probe in self.probes]
        begun = asdict(self._begun) if self._begun else None
        return json.dumps({"conditions": self._conditions, "probes": probes, "begun": begun})

    def begin(self, size: int, kills: Mapping[str, int]) -> None:
        """Note that this size is about to be run, and the kernel's counts before it."""
        before = self._begun
        again = before is not None and size >= HALF * before.per_gpu
        self._begun = Begun(size, 1 + (before.times if before and again else 0), dict(kills))
        self._write()

    def end(self, probe: Probe) -> None:
        """Note the peak of the size that was begun."""
        self.probes.append(probe)
        self._begun = None
        self._write()

    def ran_out(self) -> None:
        """Note that the memory of this rank ran out, so that the other ranks end, too."""
        if self._begun:
            self._writes = True
            with suppress(OSError):
                self.end(Probe(self._begun.per_gpu, None))

    def drop(self) -> None:
        """Forget the size that was begun: it ended by an error of this rank that has nothing to do with memory."""
        self._begun, self._writes = None, True
        with suppress(OSError):
            self._write()

    def close(self) -> None:
        """Remove the file."""
        if self.file and self._writes:
            self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.file and self._writes:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, self.text() + "\n")
