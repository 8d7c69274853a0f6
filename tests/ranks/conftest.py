from pathlib import Path

import pytest

from tests.support.harness import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)
