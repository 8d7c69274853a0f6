"""Note a size before it is run, so that a start after a kill knows that it didn't fit. On rank 0, for all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isobatch.conf.rundir.files import write_atomic
from isobatch.scaling.reading import Unreadable, read_json
from isobatch.scaling.tuning.memory import Probe

FILE = "probing.json"


class Journal:
    """The probes of a search that hasn't ended, in a file.

    Args:
        folder: of the file; None: nothing is noted.
        conditions: what the probes depend on; those of others aren't used.

    Attributes:
        probes: those of an earlier start; a size that was begun and not ended didn't fit.
    """

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any]) -> None:
        self._file = folder / FILE if folder else None
        self._conditions = dict(conditions)
        self.probes: list[Probe] = []
        self._noted: list[Probe] = []

    def read(self) -> None:
        """Read the probes of an earlier start; a damaged file is ignored, since it saves time only."""
        with suppress(OSError, Unreadable, TypeError, KeyError, ValueError):
            found = read_json(self._file) if self._file else None
            if isinstance(found, dict) and found["conditions"] == self._conditions:
                self.probes = self.known(json.dumps(found["probes"]))
                self._noted = list(self.probes)

    def text(self) -> str:
        """Return the probes as text for the other ranks."""
        return json.dumps([list(asdict(probe).values()) for probe in self.probes])

    @staticmethod
    def known(text: str) -> list[Probe]:
        """Return the probes in the text of rank 0."""
        return [Probe(*pair) for pair in json.loads(text)]

    def begin(self, size: int) -> None:
        """Note that this size is about to be run: it doesn't fit, unless ``end`` follows."""
        self._write([*self._noted, Probe(size, None, killed=True)])

    def end(self, probe: Probe) -> None:
        """Note the peak of the size that was begun."""
        self._noted.append(probe)
        self._write(self._noted)

    def close(self) -> None:
        """Remove the file."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _write(self, probes: list[Probe]) -> None:
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            pairs = [list(asdict(probe).values()) for probe in probes]
            write_atomic(self._file, json.dumps({"conditions": self._conditions, "probes": pairs}) + "\n")
