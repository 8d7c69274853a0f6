"""Collect the measurements of the critical batch: by the parts of action=tune, and by the run's own training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isobatch.conf.identity import identity
from isobatch.conf.rundir.reading import read_run
from isobatch.scaling.noise import RAW
from isobatch.scaling.tuning.witnesses import Witness, over_run, stretches_of
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.parts import Results


def witnesses(bench: Bench, parts: Results) -> list[Witness]:
    """Return the measurements of the critical batch, the most trusted one first: branches train at other batches."""
    branch, noise = parts.get("branch", {}), parts.get("noise", {})
    found = list[Witness]()
    if branch.get("critical_batch"):
        found.append(Witness("branch", branch["critical_batch"], *(branch.get("interval") or (None, None))))
    both = [of_noise("noise", noise)] if noise.get("over_run") else []
    trained = bench.agree(in_training(bench) if bench.session.world.rank == 0 else {})
    if trained:  # it is of the whole run; the part may be of its start only, but has the optimizer's norm
        first = not both or trained["norm"] == noise["norm"]
        both.insert(0 if first else 1, of_noise("noise in training", trained))
    return found + both


def in_training(bench: Bench) -> dict[str, Any]:
    """Return the noise that the run itself measured (``noise.every``): over the whole run, and its last known value.

    Returns:
        Nothing if the run hasn't trained, has another recipe, or doesn't know its noise.
    """
    config, files = bench.config, read_run(bench.run)
    if files.plan.get("identity") not in (identity(config), identity(config.model_copy(update={"init_from": None}))):
        return {}
    known = [line for line in files.metrics if line.get("noise/scale") is not None and line.get("samples")]
    whole = over_run([(line["samples"], line["noise/scale"]) for line in known], stretches_of(bench.opened.plan))
    if not whole:
        return {}
    norms = [event["norm"] for event in files.events if event.get("event") == "noise" and "norm" in event]
    last = {name: known[-1].get(f"noise/{name}") for name in ("scale", "low", "high")}
    return {**last, "over_run": whole, "norm": norms[-1] if norms else RAW.name}


def of_noise(name: str, found: Mapping[str, Any]) -> Witness:
    """Return the noise over a whole run as a witness, with the relative interval of its last known value."""
    whole, scale = found["over_run"], found["scale"]
    bounds = (found["low"], found["high"]) if scale else (None, None)
    return Witness(name, whole, *(None if bound is None else bound * whole / scale for bound in bounds))
