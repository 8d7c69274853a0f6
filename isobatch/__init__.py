"""Describe a training run by its global batch, launch it on any hardware, get the same run.

The Python API is in ``isobatch/api.py``. Importing it costs time, so that happens on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isobatch.api import Result, UserError, history, load, plan, report, train
    from isobatch.scaling.report.compare.comparison import Report

__all__ = ["Report", "Result", "UserError", "history", "load", "plan", "report", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'isobatch' has no attribute {name!r}")
    if name == "Report":
        from isobatch.scaling.report.compare.comparison import Report

        return Report
    from isobatch import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
