"""Free ports, and eyes for processes that should be gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.ports import free_ports


@pytest.fixture
def free_port() -> Callable[[], int]:
    return lambda: free_ports(1)[0]
