"""What the tokens of an answer cost."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from meshserve.v1 import types_pb2
from services.gateway.usage import cost
from services.runtime.settings import PriceSettings


def price(**prices: float | None) -> PriceSettings:
    return PriceSettings.model_validate(prices)


def test_a_million_tokens_cost_their_price() -> None:
    usage = types_pb2.Usage(prompt_tokens=10**6, completion_tokens=10**6)
    assert cost(usage, price(prompt=2.5, completion=10.0)) == 12.5


def test_tokens_from_the_prefix_cache_have_a_price_of_their_own() -> None:
    usage = types_pb2.Usage(prompt_tokens=1000, cached_prompt_tokens=400, completion_tokens=50)
    prices = price(prompt=3, cached_prompt=0.5, completion=8)
    assert cost(usage, prices) == pytest.approx((600 * 3 + 400 * 0.5 + 50 * 8) / 1e6)
    assert cost(usage, price(prompt=3, completion=8)) == pytest.approx((1000 * 3 + 50 * 8) / 1e6)
    assert cost(usage, price(prompt=3, cached_prompt=0, completion=0)) == pytest.approx(0.0018)


@pytest.mark.parametrize("wrong", [{"prompt": -1, "completion": 1}, {"prompt": float("inf")}, {}])
def test_a_price_is_a_number_that_is_not_negative(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        price(**wrong)
