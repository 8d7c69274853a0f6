"""Block torch, so that a test that needs it fails: ``python -m pytest -p tests.support.no_torch tests/unit``."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
