from pathlib import Path

import pytest

from tests.support.composing import cached_composition as cached_composition
from tests.support.harness import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)
