"""The outcome of an attempt at a run, as stored in ``outcome.json``. Torch-free."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from isobatch.scaling.reading import Unreadable, read_json

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
State = Literal["running", "finished", "stopped", "refused", "oom", "crashed"]

EXIT_CODE: dict[State, int] = {"finished": 0, "refused": 2, "stopped": 75, "oom": 1, "crashed": 1, "running": 1}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold the final state of an attempt at a run, or ``running``.

    Attributes:
        step, samples: optimizer steps and samples completed.
        attempt: id of this start of the command; ``restarts`` counts the agent's restarts within it.
    """

    state: State
    cause: str
    step: Count
    samples: Count
    attempt: str
    restarts: Count = 0

    @property
    def exit_code(self) -> int:
        return EXIT_CODE[self.state]


_ADAPTER = TypeAdapter(Outcome)


def read_outcome(directory: Path) -> Outcome | None:
    """Return the outcome of the run in ``directory``; None if there is none. Raises Unreadable if it is damaged."""
    fields = None
    try:
        fields = read_json(directory / "outcome.json")
        return _ADAPTER.validate_python(fields)
    except FileNotFoundError:
        return None
    except ValidationError:
        raise Unreadable(f"not an outcome: {fields!r:.200}") from None


def known_outcome(directory: Path) -> Outcome | None:
    """Return the outcome of the run in ``directory``; None if it is missing or damaged."""
    with suppress(Unreadable):
        return read_outcome(directory)
    return None
