"""Set up all tests: no second thread before ranks are forked, and the same examples on every machine."""

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

# Forked children hang if their parent ever ran a multi-threaded tensor op, so this process never runs one.
os.environ["OMP_NUM_THREADS"] = "1"

# Health checks that look at the clock fail on a slow machine. The examples of a property may share a fixture.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("test", derandomize=True, database=None, **COMMON)
settings.register_profile("fuzz", max_examples=2000, database=None, print_blob=True, **COMMON)
settings.load_profile("test")

# Remove the variables that a cluster, a launcher or a terminal left in the environment.
for name in list(os.environ):
    if name.startswith(("SLURM_", "TORCHELASTIC_", "ACCELERATE_")) or name in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "COLUMNS", "LINES",
    ):  # fmt: skip
        del os.environ[name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail on a skipped test that isn't marked `gpu`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failed one where `--no-skips` asks for it."""
    report = yield
    if report.skipped and item.config.getoption("no_skips") and not item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"skipped, which --no-skips forbids: {report.longrepr}"
    return report
