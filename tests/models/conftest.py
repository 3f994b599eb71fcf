from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from emoscale.models.unified import UnifiedTransformer
from tests.packing import ACOUSTIC, VISUAL, VOCABULARY


@pytest.fixture
def tiny() -> Callable[..., UnifiedTransformer]:
    """Build a small transformer over the widths of `tests.packing`."""

    def build(**changes: Any) -> UnifiedTransformer:
        shape = {"vocabulary": VOCABULARY, "visual_width": VISUAL, "acoustic_width": ACOUSTIC, "layers": 2, "width": 16, "heads": 4, "ffn": 24, "positions": 40}
        return UnifiedTransformer(**shape | {"dropout": 0.0} | changes)

    return build
