"""A decode step launches these kernels and no more: where one sequence is served, their number is
what it waits for beside the weights.

What a kernel costs that has next to nothing to compute is some 2 us. The weights of a layer of 8B
take 145 us in bfloat16 and 40 in four bits, those of a layer of 0.6B take 10.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from services.engine.core.model_config import ExpertsConfig, ModelConfig, RopeConfig
from tests.fakes.launches import LATE, decode_launches, model_on_meta

LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=4096,
    intermediate_size=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_context_tokens=8192,
    norm_eps=1e-5,
    rope=RopeConfig(theta=5e5, rotary_dim=128),
)
QWEN3 = replace(LLAMA, architecture="Qwen3ForCausalLM", qk_norm=True, tie_embeddings=True)
GEMMA2 = replace(
    LLAMA,
    architecture="Gemma2ForCausalLM",
    hidden_size=2304,
    intermediate_size=9216,
    heads=8,
    kv_heads=4,
    head_dim=256,
    rope=RopeConfig(theta=1e4, rotary_dim=256),
    attention_softcap=50.0,
    activation="gelu_tanh",
    tie_embeddings=True,
)
QWEN3_MOE = replace(
    QWEN3,
    architecture="Qwen3MoeForCausalLM",
    hidden_size=2048,
    kv_heads=4,
    experts=ExpertsConfig(count=128, per_token=8, intermediate_size=768, normalize=True),
)
MODELS = {"llama": LLAMA, "qwen3": QWEN3, "gemma2": GEMMA2, "qwen3-moe": QWEN3_MOE}

# Of a layer, in CUDA C++: `linear` is a product with all that it ends with, the gate included.
NORM, PRODUCT, ATTENTION = "rms_norm", "linear", ("rotary_kv_kernel", "attention_decode")
DENSE = (NORM, PRODUCT, *ATTENTION, PRODUCT, NORM, PRODUCT, PRODUCT)
# A norm that rounds, rounding alone, and the norm of the rows of logits are one kernel in Triton.
ROUNDS = "rms_norm_kernel"
ROUNDED = (ROUNDS, PRODUCT, *ATTENTION, ROUNDS, PRODUCT, ROUNDS, PRODUCT, ROUNDS, PRODUCT)
ROUTED = (NORM, PRODUCT, *ATTENTION, PRODUCT, NORM, PRODUCT, "choose_kernel", "plan_kernel")
LAYERS = {
    ("llama", "bfloat16"): DENSE,
    ("llama", "int4"): DENSE,
    ("llama", "w8a8"): ROUNDED,
    ("llama", "fp8"): ROUNDED,
    ("qwen3", "bfloat16"): DENSE,
    ("qwen3", "int4"): DENSE,
    ("qwen3", "w8a8"): ROUNDED,
    # Its two norms behind attention and feed-forward are part of those that follow.
    ("gemma2", "bfloat16"): DENSE,
    ("gemma2", "int4"): DENSE,
    ("gemma2", "w8a8"): ROUNDED,
    ("qwen3-moe", "bfloat16"): (*ROUTED, "gate_up_kernel", "down_kernel", "combine_kernel"),
    ("qwen3-moe", "int4"): (
        *(*ROUTED, "grouped_experts_kernel", "activation_kernel"),
        *("grouped_experts_kernel", "combine_kernel"),
    ),
}
# Of a step: tokens and angles in, the rows of logits out.
ENDS = ("embedding", "rotary_angles_kernel", ROUNDS, PRODUCT, "copy_")


@pytest.mark.parametrize(("model", "weights"), LAYERS)
def test_a_decode_step_launches_what_its_layers_need(model: str, weights: str) -> None:
    layer = Counter(LAYERS[model, weights])
    config = MODELS[model]
    for sequences in (1, 8):
        two, three = (
            Counter(
                decode_launches(
                    model_on_meta(replace(config, num_layers=layers), weights),
                    sequences,
                    compiled=True,
                )
            )
            for layers in (2, 3)
        )
        assert three - two == layer
        # Before the first layer there is nothing to add to the stream: there a norm rounds behind.
        first = (NORM,) if ROUNDS in layer else ()
        assert two - layer - layer == Counter((*ENDS, *first))


@pytest.mark.parametrize(
    ("model", "weights"),
    [("llama", "bfloat16"), ("llama", "int4"), ("gemma2", "w8a8"), ("qwen3-moe", "bfloat16")],
)
def test_adapters_take_two_launches_more_for_each_projection(model: str, weights: str) -> None:
    layer: Counter[str] = Counter()
    for sequences in (64, 1):
        two, three = (
            Counter(
                decode_launches(
                    model_on_meta(replace(MODELS[model], num_layers=layers), weights),
                    sequences,
                    compiled=True,
                    has_adapters=True,
                )
            )
            for layers in (2, 3)
        )
        # All that come behind it may read what it has written before they wait for others.
        grouping = "group_by_adapter_kernel" + LATE
        assert two[grouping] == three[grouping] == 1
        layer = three - two
        # Queries, keys and values are one projection, and so are gate and up.
        projections = 2 if model == "qwen3-moe" else 4
        assert layer["shrink_kernel"] == layer["expand_kernel"] == projections
    if model == "llama":  # one sequence
        more = layer - Counter(LAYERS[model, weights])
        assert more == Counter(shrink_kernel=4, expand_kernel=4, activation_kernel=1)


def test_without_nvcc_there_are_more() -> None:
    two, three = (
        Counter(decode_launches(model_on_meta(config, "w8a8"), 1, compiled=False))
        for config in (LLAMA, replace(LLAMA, num_layers=3))
    )
    assert three - two == Counter(
        {
            "rms_norm_kernel": 3,
            "scaled_linear_kernel": 4,
            "rotary_kv_kernel": 1,
            # The gate, and what joins the parts that products and attention are divided into.
            "gated_rows_kernel": 1,
            "sum_splits_kernel": 3,
            f"combine_kernel{LATE}": 1,
            f"decode_kernel{LATE}": 1,
        }
    )
