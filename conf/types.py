"""What every section of a config is made of, and types of keys that several of them share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def _with_numbers(name: object) -> object:
    """The modules of a Sequential are named by their places, which need no quotes."""
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


Free = dict[str, Any]  # keyword arguments: whoever takes them knows their names
Modules = tuple[Annotated[str, Field(min_length=1), BeforeValidator(_with_numbers)], ...]  # patterns of their names
