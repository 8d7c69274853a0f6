"""The section ``log``: the trackers that get the lines of metrics.jsonl, and the arguments of each.

A tracker has a section here, a file of its name in trainers/trackers/, and an extra of its name in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from isobatch.conf.types import Free, Interval, OneOf, Section, Target, Text
from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import Positive


class TensorBoard(Section):
    pass


class WandB(Section):
    project: Text | None = None
    entity: Text | None = None
    group: Text | None = None
    name: Text | None = None
    notes: Text | None = None
    tags: tuple[Text, ...] = ()


class MLflow(Section):
    tracking_uri: Text | None = None
    experiment: Text | None = None
    name: Text | None = None
    tags: dict[str, str] = Field(default_factory=dict)


class Trackio(Section):
    project: Text | None = None
    name: Text | None = None
    group: Text | None = None


TRACKERS: dict[str, type[Section]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def _listed(value: object) -> object:
    """Accept one name without brackets, and a list for the tuple that it is."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Log(Section):
    every: Interval
    peak_tflops: Positive | None
    to: Annotated[tuple[Annotated[str, OneOf(tuple(TRACKERS))], ...], BeforeValidator(_listed)]
    target: Target | None = Field(alias="_target_")
    args: Free

    @property
    def own_args(self) -> Free:
        """Return the arguments of ``log._target_``: those that aren't a shipped tracker's."""
        return {name: value for name, value in self.args.items() if name not in TRACKERS}

    @model_validator(mode="after")
    def _each_tracker_once(self) -> Log:
        if twice := [name for name in self.to if self.to.count(name) > 1]:
            raise UserError(f"log.to names {twice[0]} twice", "name it once", "log.to")
        return self

    @model_validator(mode="after")
    def _args_are_someones(self) -> Log:
        if self.own_args and self.target is None:
            name = next(iter(self.own_args))
            near = get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean log.args.{near[0]}? " if near else ""
            fix = f"{hint}log.args holds arguments of {', '.join(TRACKERS)}, and with log._target_ those of your own"
            raise UserError(f"log.args.{name} belongs to no tracker", fix, f"log.args.{name}")
        for name in TRACKERS.keys() & self.args.keys():
            if name not in self.to:
                problem = f"log.args.{name} is for the tracker {name}, which log.to doesn't name"
                raise UserError(problem, f"give log.to=[{', '.join([*self.to, name])}], or leave it out", "log.to")
            _check(name, self.args[name])
        return self


def _check(name: str, args: object) -> None:
    """Raise UserError for an argument that the tracker ``name`` doesn't take, or whose value isn't valid."""
    section, key = TRACKERS[name], f"log.args.{name}"
    takes = f"it takes {', '.join(section.model_fields) or 'no arguments'}"
    if not isinstance(args, dict):
        raise UserError(f"{key}={args!r:.100} isn't a mapping", takes, key, args)
    try:
        section.model_validate(args, strict=False)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join([key, *map(str, fault["loc"])])
        if fault["type"] == "extra_forbidden":
            raise UserError(f"{key} isn't an argument of the tracker {name}", takes, key, fault["input"]) from None
        value = fault["input"]
        fix = f"""as text: "{key}='{value}'\"""" if fault["type"] == "string_type" else fault["msg"]
        raise UserError(f"{key}={value!r:.100} isn't valid", fix, key, value) from None


def refuse_missing_packages(to: Iterable[str]) -> None:
    """Raise UserError if the package of a shipped tracker in ``to`` isn't installed. Don't import it."""
    for name in to:
        spec: Any = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as the one that wandb makes
            problem = f"log.to={name} needs the package {name}, which isn't installed"
            raise UserError(problem, f"pip install 'isobatch[{name}]' (in a clone: '.[{name}]')", "log.to", name)
