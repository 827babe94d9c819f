"""What the tests of attention on a GPU share, whichever kernel they are of."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.triton.attention import paged_attention_triton
from tests.fakes.paged_attention import PagedStep, Pattern

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FP8, INT8 = torch.float8_e4m3fn, torch.int8
# Of queries, and of the cache.
FORMATS = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, FP8), (F16, FP8), (BF16, INT8), (F32, INT8)]
PATTERNS = [
    Pattern(),
    Pattern(softcap=2.0),
    Pattern(window=1),
    Pattern(window=50),
    Pattern(window=300),
    Pattern(window=33, global_tokens=70, softcap=5.0),
    Pattern(window=50, global_tokens=3),
    Pattern(window=130, global_tokens=130),
    Pattern(global_tokens=9),
]
# Of outputs of about 1; the interpreter cuts bfloat16 off where a GPU rounds it.
_TOLERANCE = {F32: 2e-5, F16: 4e-3, BF16: 4e-2}


def assert_close(found: Tensor, exact: Tensor) -> None:
    tolerance = _TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)


def check(step: PagedStep, pattern: Pattern | None = None) -> None:
    """The kernels compute what the reference does."""
    pattern = pattern or Pattern()
    assert_close(step.attended(paged_attention_triton, pattern), step.exact(pattern))
