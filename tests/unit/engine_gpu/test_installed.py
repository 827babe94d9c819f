"""Attention by libraries that may be installed is asked for what the op means.

The libraries are stood in for by what their documentation says of the arguments, token by token.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import installed, paged_attention
from services.engine.core.kernels.installed.flash_attention import paged_attention_flash
from services.engine.core.kernels.installed.flash_infer import paged_attention_flashinfer
from tests.fakes.paged_attention import PagedStep, Pattern, Shape

SEQUENCES = [(1, 40), (17, 0), (0, 0), (5, 64), (1, 0), (33, 100)]
PATTERNS = [Pattern(), Pattern(window=24), Pattern(softcap=3.0), Pattern(window=7, softcap=2.0)]
SHAPE = Shape(6, 2, 64, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, left: int, softcap: float
) -> Tensor:
    """Causal, the last query seeing the last key; `left`: keys before its own, -1 for all."""
    heads = queries.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(heads, 1) for each in (keys, values))
    rows = []
    for index, query in enumerate(queries.double()):
        last = len(keys) - len(queries) + index
        first = 0 if left < 0 else max(0, last - left)
        scores = torch.einsum("hd,khd->hk", query, keys[first : last + 1]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values[first : last + 1]))
    return torch.stack(rows)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    assert causal
    assert window_size[1] == (-1 if window_size[0] == -1 else 0)
    assert all(each.dtype == torch.int32 for each in (cache_seqlens, page_table, cu_seqlens_q))
    parts = []
    for row, (begin, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        assert end - begin <= max_seqlen_q
        if begin == end:
            continue
        context = int(cache_seqlens[row])
        keys, values = (each[page_table[row].long()].flatten(0, 1) for each in (k_cache, v_cache))
        parts.append(
            attend(
                q[begin:end],
                keys[:context],
                values[:context],
                softmax_scale,
                window_size[0],
                softcap,
            )
        )
    return torch.cat(parts).to(q.dtype)


class BatchPrefillWithPagedKVCacheWrapper:
    plans = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.nbytes == 128 << 20
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        type(self).plans += 1
        assert causal
        assert (num_qo_heads, num_kv_heads, head_dim_qk) == (6, 2, 64)
        assert q_data_type == kv_data_type == torch.bfloat16
        assert bool((paged_kv_last_page_len <= page_size).all())
        self.args: Any = (sm_scale, window_left, logits_soft_cap or 0.0)
        self.rows = list(pairwise(qo_indptr.tolist()))
        self.pages = [
            (paged_kv_indices[begin:end].long(), page_size * max(end - begin - 1, 0) + int(last))
            for (begin, end), last in zip(
                pairwise(paged_kv_indptr.tolist()), paged_kv_last_page_len, strict=True
            )
        ]
        assert all(context <= page_size * len(pages) for pages, context in self.pages)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert q.is_contiguous()
        parts = []
        for (begin, end), (pages, context) in zip(self.rows, self.pages, strict=True):
            if begin == end:
                continue
            keys, values = (each[pages].flatten(0, 1)[:context] for each in paged_kv_cache)
            parts.append(attend(q[begin:end], keys, values, *self.args))
        return torch.cat(parts).to(q.dtype)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "flash_attn_interface": flash_attn_with_kvcache,
        "flashinfer": BatchPrefillWithPagedKVCacheWrapper,
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, name, module)


def asked(implementation: Any, step: PagedStep, pattern: Pattern) -> Tensor:
    found: Tensor = implementation(
        step.queries,
        step.cache,
        step.metadata,
        step.shape.scale,
        pattern.window,
        pattern.softcap,
        pattern.global_tokens,
    )
    return found


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("implementation", [paged_attention_flash, paged_attention_flashinfer])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_they_are_asked_for_what_the_op_means(implementation: Any, pattern: Pattern) -> None:
    step = PagedStep.random(SHAPE, SEQUENCES)
    found = asked(implementation, step, pattern)
    torch.testing.assert_close(found.float(), step.exact(pattern), atol=3e-2, rtol=3e-2)


@pytest.mark.usefixtures("libraries")
def test_flash_attention_serves_captured_steps() -> None:
    step = PagedStep.random(SHAPE, [(1, 40), (1, 3), (2, 64)])
    found = asked(paged_attention_flash, step.bounded(4, 200), Pattern(window=24))
    exact = step.exact(Pattern(window=24))
    torch.testing.assert_close(found.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.usefixtures("libraries")
def test_flashinfer_plans_a_step_once_for_all_layers_alike() -> None:
    step = PagedStep.random(SHAPE, SEQUENCES)
    before = BatchPrefillWithPagedKVCacheWrapper.plans
    for _ in range(3):
        asked(paged_attention_flashinfer, step, Pattern())
        asked(paged_attention_flashinfer, step, Pattern(window=24))
    assert BatchPrefillWithPagedKVCacheWrapper.plans == before + 2


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("implementation", [paged_attention_flash, paged_attention_flashinfer])
def test_what_they_do_not_serve_is_the_references(implementation: Any) -> None:
    step = PagedStep.random(Shape(4, 2, 32), [(3, 20), (1, 9)])  # float32
    torch.testing.assert_close(asked(implementation, step, Pattern()), step.exact(Pattern()))
    pattern = Pattern(window=8, global_tokens=4)
    step = PagedStep.random(SHAPE, SEQUENCES)
    found = asked(implementation, step, pattern)
    torch.testing.assert_close(found.float(), step.exact(pattern), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("capability", "is_hopper"), [((8, 9), False), ((9, 0), True), ((12, 0), False)]
)
def test_flash_attention_3_is_for_hopper_alone(
    libraries: None, capability: tuple[int, int], is_hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = {each.name: each.unavailable() for each in paged_attention.implementations["cuda"]}
    assert (found["flash-attention-3"] is None) == is_hopper


def test_they_are_the_last_to_be_used_and_only_where_they_are() -> None:
    installed.activate()
    names = [each.name for each in paged_attention.implementations["cuda"]]
    assert {"flash-attention-3", "flashinfer", "triton"} <= set(names)
    reasons = {each.name: each.unavailable() for each in paged_attention.implementations["cuda"]}
    assert reasons["flash-attention-3"] == "FlashAttention-3 is not installed"
    assert reasons["flashinfer"] == "FlashInfer is not installed"
