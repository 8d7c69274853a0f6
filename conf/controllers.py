"""The choices of ``control=``: a section each, with a YAML in control/."""

from __future__ import annotations

from typing import Literal

from isobatch.conf.types import Interval, Path, Section
from isobatch.scaling.control import LrMode
from isobatch.scaling.limits import Positive, Size


class NoControl(Section):
    name: Literal["none"]


class _Control(Section):
    least: Size | None
    most: Size | None
    quantum: Size | None
    every: Interval
    patience: Size
    lr: LrMode


class NormTest(_Control):
    name: Literal["norm-test"]
    eta: Positive


class FollowNoise(_Control):
    name: Literal["noise"]
    factor: Positive


class FollowVariance(_Control):
    name: Literal["variance"]
    alpha: Positive


class Goodput(_Control):
    name: Literal["goodput"]
    half_speed: Positive | None


class Bandit(_Control):
    name: Literal["bandit"]
    per: Literal["sample", "second"]
    half_speed: Positive | None
    prior: Path | None


AnyControl = NoControl | NormTest | FollowNoise | FollowVariance | Goodput | Bandit
