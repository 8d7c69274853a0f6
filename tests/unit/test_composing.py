"""Test that composing with cached files gives the same configs as Hydra."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from isobatch.conf.keys import HERE
from tests.support.composing import compose_cached


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=lamb", "task=images", "lr.peak=0.5", "run.name=${task.name}"],
        ["experiment=digits_large", "seed=3", "batch.global_size=1024"],
        ["+lr.new=1", "++seed=2", "~batch.per_gpu", "task.args={a: [1, {b: null}]}"],
        ["task={name: mine}", "engine=fsdp", "engine.stage=2"],
        ["lr={peak: 1}", "duration='1 ep'", "duration=2ep"],
        ["optimizer=lam", "seed=1"],
        ["lr.peek=1"],
        ["+optimizer=sgd"],
        ["seed=${nowhere}"],
        ["task=[digits,images]"],
    ],
    ids=str,
)
def test_cached_files_give_the_same_config(overrides: list[str]) -> None:
    def composed(by: Any) -> tuple[Any, ...]:
        with initialize_config_dir(str(HERE), version_base="1.3"):
            try:
                config = by("config", overrides)
                return OmegaConf.to_container(config), config._metadata.flags
            except Exception as error:
                return type(error), str(error)

    expected = composed(compose)
    assert composed(compose_cached) == expected
    assert composed(compose_cached) == expected  # the cached config isn't changed
