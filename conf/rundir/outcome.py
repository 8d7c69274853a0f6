"""How an attempt at a run ended: the content of ``outcome.json``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import read_json

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
    step: int
    samples: int
    attempt: str
    restarts: int = 0

    @property
    def exit_code(self) -> int:
        return EXIT_CODE[self.state]

    @classmethod
    def of(cls, fields: Any) -> Outcome:
        """Make an outcome of what ``outcome.json`` holds. Raises ValueError for anything else."""
        kinds = {"state": str, "cause": str, "step": int, "samples": int, "attempt": str, "restarts": int}
        if not isinstance(fields, dict) or any(type(fields.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError(f"not an outcome: {fields!r:.200}")
        if fields["state"] not in get_args(State):
            raise ValueError(f"not a state of a run: {fields['state']!r:.200}")
        if not all(0 <= fields[key] < 2**63 for key in ("step", "samples", "restarts")):
            raise ValueError(f"not an outcome: a count in {fields!r:.200}")
        return cls(**{key: fields[key] for key in kinds})

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """Return what ``outcome.json`` in ``folder`` says; None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        file = folder / "outcome.json"
        try:
            return cls.of(read_json(file))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{file} is damaged ({error})", "move it away, or name another run.dir", "run.dir"
            ) from None
