from pathlib import Path

import pytest

from tests.support.composing import composed_once as composed_once
from tests.support.harness import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)
