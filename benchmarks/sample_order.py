"""Time the sample order on one core: `python -m benchmarks.sample_order`."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from isobatch.scaling.order import indices

RANGE = 1 << 20
REQUEST = 32
REQUESTS = 1000
# name -> (samples, target in million indices per second); just above an even power of two, cycle-walking is longest
DATASETS = {
    "50,000": (50_000, 5.0),
    "10^6": (10**6, 5.0),
    "10^9": (10**9, 5.0),
    "10^12": (10**12, 5.0),
    "2^20 + 1": (2**20 + 1, 3.0),
    "2^40 + 1": (2**40 + 1, 3.0),
}


def rows() -> list[dict[str, Any]]:
    """Return a row per measurement: name, value, unit, and target ("" if there is none)."""
    table = []
    for name, (n, target) in DATASETS.items():
        rate = RANGE / _best(_range, n, RANGE) / 1e6
        table.append({"what": f"a range, n = {name}", "value": rate, "unit": "million/s", "target": f">= {target:g}"})
    for name, (n, _) in DATASETS.items():
        cost = _best(_micro_batches, n, REQUESTS) / REQUESTS * 1e6
        table.append({"what": f"a request of {REQUEST}, n = {name}", "value": cost, "unit": "µs", "target": ""})
    ratio = _best(_range, 10**6, 10**6) / _best(_numpy, 10**6)
    table.append({"what": "an epoch of 10^6 / numpy's permutation", "value": ratio, "unit": "x", "target": ""})
    return table


def _range(seed: int, n: int, length: int) -> None:
    indices(seed, n, 0, length)


def _micro_batches(seed: int, n: int, requests: int) -> None:
    """Make consecutive requests like a loader, including the cost of starting an epoch."""
    for start in range(0, requests * REQUEST, REQUEST):
        indices(seed, n, start, start + REQUEST)


def _numpy(seed: int, n: int) -> None:
    np.random.default_rng(seed).permutation(n)


def _best(work: Callable[..., None], *args: int) -> float:
    """Return the seconds of the fastest of five tries, each with a new seed, so that no table is cached."""
    seconds = []
    for seed in range(5):
        start = perf_counter()
        work(seed, *args)
        seconds.append(perf_counter() - start)
    return min(seconds)


def main() -> None:
    for row in rows():
        print(f"{row['what']:<42}{row['value']:>9.2f} {row['unit']:<10}{row['target']}")


if __name__ == "__main__":
    main()
