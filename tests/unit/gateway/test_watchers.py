"""How many may watch a gateway at a time, and how many of one tenant."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from services.gateway.context import Tenant
from services.gateway.watchers import Watchers
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics

OPERATOR = Tenant("operator", operator=True)
ONE, OTHER = Tenant("one"), Tenant("other")


def test_one_tenant_cannot_take_the_places_of_others() -> None:
    watchers = Watchers(16, Metrics("gateway"))
    with ExitStack() as watching:
        for _ in range(2):
            watching.enter_context(watchers.one_more(ONE))
        with pytest.raises(ServiceError, match="'one' watch already") as refused:
            watching.enter_context(watchers.one_more(ONE))
        assert refused.value.reason is Reason.LIMIT_REACHED
        watching.enter_context(watchers.one_more(OTHER))
        for _ in range(13):
            watching.enter_context(watchers.one_more(OPERATOR))
        with pytest.raises(ServiceError, match="16 watch already"):
            watching.enter_context(watchers.one_more(OPERATOR))


def test_a_place_is_free_again_when_its_watcher_has_gone() -> None:
    metrics = Metrics("gateway")
    watchers = Watchers(1, metrics)
    for _ in range(3):
        with watchers.one_more(ONE):
            assert metrics.registry.get_sample_value("meshserve_gateway_watchers") == 1
    assert metrics.registry.get_sample_value("meshserve_gateway_watchers") == 0
