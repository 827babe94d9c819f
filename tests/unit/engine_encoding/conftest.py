"""Small encoders, saved once."""

from __future__ import annotations

import pytest

from tests.fakes.small_encoders import SavedEncoders


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedEncoders:
    """Every model of MODELS, when it is asked for."""
    return SavedEncoders(tmp_path_factory.mktemp("encoders"))
