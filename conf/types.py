"""The base of every section of the config, and the types that sections share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator
from pydantic_core import CoreSchema, core_schema

from isobatch.scaling.errors import UserError
from isobatch.scaling.limits import NotNegative, Positive, Size
from isobatch.scaling.units import Duration, Unit

TARGET = r"[^\W\d]\w*(\.[^\W\d]\w*)+"  # a dotted name
NAME_BYTES, PATH_BYTES = 255, 3800  # Linux allows 4,096, of which what Isobatch puts below needs some


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def tag(section: type[Section]) -> str:
    """Return the name of a group's choice, or an empty string."""
    field = section.model_fields.get("name")
    return str(get_args(field.annotation)[0]) if field and get_origin(field.annotation) is Literal else ""


@dataclass(frozen=True)
class OneOf:
    """Accept the names of a registry: a Literal whose names are known only at import."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


@dataclass(frozen=True)
class Matching:
    """Accept text that fully matches a pattern.

    Attributes:
        like: a description of valid text, for the message.
        endings: what text may lack at its end; of evaluations, text may also lack ``val/`` at its start.
    """

    pattern: str
    like: str
    endings: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text):
            whole = [f"{start}{text}{end}" for start in ("", "val/") for end in ("", *self.endings) if self.endings]
            meant = [candidate for candidate in whole if re.fullmatch(self.pattern, candidate)]
            fix = f"write {' or '.join(meant[: len(self.endings)])}" if meant else f"it has to be {self.like}"
            raise UserError(f"{text!r:.200} isn't valid", fix, value=text)
        return text


def _duration(value: object, *usual: Unit) -> Duration:
    duration = Duration.parse(value, usual or ("ep", "st", "sa"))
    if duration.unit == "min":
        fix = "use ep, st, sa, tok or %; only checkpoint.every and stop.after take minutes"
        raise UserError(f"{duration} is in minutes", fix)
    return duration


def _length_or_share(value: object) -> Duration:
    return _duration(value, "ep", "st", "%")


def _length_or_minutes(value: object) -> Duration:
    return Duration.parse(value, ("ep", "st", "min"))


def _minutes(value: object) -> Duration:
    duration = Duration.parse(value, ("min",))
    if duration.unit != "min":
        raise UserError(f"{duration} isn't a time", "give minutes, such as 90min")
    return _lasting(duration)


def _half_life(value: object) -> Duration:
    try:
        duration = _duration(value)
    except UserError as error:
        raise UserError(error.problem, "ema is the half-life of the average, such as 2000sa, not its decay") from None
    return _lasting(duration)


def _lasting(duration: Duration) -> Duration:
    if duration.value == 0:
        raise UserError(f"{duration} isn't valid", "it has to be more than 0")
    return duration


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise UserError(f"{list(bounds)} has to be [least, most]")
    return bounds


def _reachable(address: str) -> str:
    if not 1 <= int(address.rpartition(":")[2]) <= 65535:
        raise UserError(f"{address} has to have a port from 1 to 65535")
    return address


def _nameable(path: str) -> str:
    """Reject a path that no file system can hold."""
    longest = max((len(part.encode()) for part in path.split("/")), default=0)
    if "\0" in path:
        raise UserError(f"{path!r:.100} has to be a path, which can't hold NUL")
    if longest > NAME_BYTES or len(path.encode()) > PATH_BYTES:
        raise UserError(
            f"{path[:60]}… has {len(path.encode()):,} bytes, and a name of {longest:,}",
            f"a path has at most {PATH_BYTES} bytes, and each name in it at most {NAME_BYTES}",
        )
    return path


def _with_numbers(name: object) -> object:
    """Accept indices of a Sequential as module names without quotes."""
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


def refuse_repeated(section: str, args: str, given: Free | None, local: Free) -> None:
    """Raise UserError if a keyword argument is given in both ``args`` and ``local``."""
    if repeated := [name for name in local if (given or {}).get(name) is not None]:
        names = ", ".join(f"{section}.local.{name}" for name in repeated)
        science = ", ".join(f"{section}.{args}.{name}" for name in repeated)
        raise UserError(f"{names} repeats {science}", "leave out one of the two", f"{section}.local.{repeated[0]}")


_AS_TEXT = PlainSerializer(str, return_type=str)

Free = dict[str, Any]  # keyword arguments of the user's classes
Modules = tuple[Annotated[str, Field(min_length=1), BeforeValidator(_with_numbers)], ...]  # patterns of their names
Dtype = Literal["bf16", "fp16"]
Length = Annotated[Duration, PlainValidator(_duration), _AS_TEXT]
LengthOrShare = Annotated[Duration, PlainValidator(_length_or_share), _AS_TEXT]
Interval = Annotated[Length, AfterValidator(_lasting)]
IntervalOrMinutes = Annotated[Duration, PlainValidator(_length_or_minutes), _AS_TEXT, AfterValidator(_lasting)]
Minutes = Annotated[Duration, PlainValidator(_minutes), _AS_TEXT]
HalfLife = Annotated[Duration, PlainValidator(_half_life), _AS_TEXT]
Seconds = Annotated[float, Field(gt=0, le=1e9)]  # within the range of clocks
Bounds = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ascending)]
Name = Annotated[str, Matching(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}", "a folder's name: letters, digits, . _ + = -")]
Target = Annotated[str, Matching(TARGET, "a class or function with its module: my_package.Name")]
Variable = Annotated[str, Matching(r"[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable")]
HostAndPort = Annotated[
    str, Matching(r"[\w.:\[\]-]*[\w\]]:\d{1,5}", "host:port, such as node-1:29500"), AfterValidator(_reachable)
]
Word = Annotated[str, Matching(r"\S+", "a word without spaces")]
Text = Annotated[str, Matching(r"[^\0]+", "text that isn't empty")]
Value = Annotated[str, Matching(r"[^\0]*", "text without NUL")]
Option = Annotated[
    str, Matching(r"--\w[^\0\n]*|-\w[^\0\n]*", "an option of sbatch, such as --exclusive or --gres=gpu:a100:4")
]
Path = Annotated[str, Field(min_length=1), AfterValidator(_nameable)]


class Usual(Section):
    """A learning rate with the global batch, in samples, that it goes with."""

    lr: Positive
    batch: Size
