"""How an attempt at a run ended: the content of ``outcome.json``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import read_json

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
State = Literal["running", "finished", "stopped", "refused", "oom", "crashed"]

EXIT_CODE: dict[State, int] = {"finished": 0, "refused": 2, "stopped": 75, "oom": 1, "crashed": 1, "running": 1}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Say how an attempt at a run ended, or that it is ``running``.

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

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """Return what ``outcome.json`` says; None if there is none. Raises UserError where it is damaged."""
        file, fields = folder / "outcome.json", None
        try:
            fields = read_json(file)
            return _ADAPTER.validate_python(fields)
        except FileNotFoundError:
            return None
        except ValueError as error:
            why = f"not an outcome: {fields!r:.200}" if isinstance(error, ValidationError) else error
            fix = "move it away, or name another run.dir"
            raise UserError(f"{file} is damaged ({why})", fix, "run.dir") from None


_ADAPTER = TypeAdapter(Outcome)
