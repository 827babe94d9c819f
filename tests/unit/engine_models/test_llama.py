"""Llama computes what `transformers` computes, however its tokens are spread over steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from services.engine.core.models import load_model
from services.runtime.modelfiles import ModelFileError

PROMPT = [1, 5, 90, 33, 7, 7, 61, 12, 44, 3, 18]

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 5_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
}

SHAPES: dict[str, dict[str, Any]] = {
    "grouped query": {},
    "one head each": {"num_key_value_heads": 6},
    "one KV head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    # Wide and low enough that YaRN's ramp begins and ends between whole dimensions.
    "rope yarn with a ramp": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.5,
            "beta_slow": 0.7,
        },
    },
    **{f"rope {name}": {"rope_parameters": rope} for name, rope in ROPE.items()},
}


def transformers_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_small_checkpoints_equal_transformers(
    changes: dict[str, Any], make_checkpoint: Any, stepper: Any
) -> None:
    directory, reference = make_checkpoint(**changes)
    model, config = load_model(directory, dtype=torch.float32, device="cpu")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    logits = stepper(model).step({"only": PROMPT})["only"]
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert stepper(model).greedy(PROMPT, 40) == transformers_greedy(reference, PROMPT, 40)


def test_dynamic_scaling_serves_the_context_it_is_given(make_checkpoint: Any, stepper: Any) -> None:
    directory, reference = make_checkpoint(rope_parameters=ROPE["dynamic"])
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(1))
    model, config = load_model(directory, dtype=torch.float32, device="cpu", max_context_tokens=100)
    assert config.max_context_tokens == 100
    logits = stepper(model).step({"only": tokens.tolist()})["only"]
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_a_context_the_model_does_not_stretch_to_is_refused(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    with pytest.raises(ModelFileError, match=r"has a context of 64 tokens .* to 65"):
        load_model(directory, dtype=torch.float32, device="cpu", max_context_tokens=65)
    _, config = load_model(directory, dtype=torch.float32, device="cpu", max_context_tokens=32)
    assert config.max_context_tokens == 32


def test_the_demo_model_equals_transformers_token_for_token(
    demo_model_path: Path, stepper: Any
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()
    model, config = load_model(demo_model_path, dtype=torch.float32, device="cpu")
    assert config.eos_token_ids == (2,)
    assert config.max_context_tokens == 8192
    # "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n" and
    # "Once upon a time", as the model's own tokenizer has them.
    chat = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    for prompt in (chat, [9703, 2753, 253, 655]):
        assert stepper(model).greedy(prompt, 24) == transformers_greedy(reference, prompt, 24)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp("small") / "model"
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return load_model(directory, dtype=torch.float32, device="cpu")[0]


sequences = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=70), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tokens=sequences, data=st.data())
def test_chunks_and_company_change_no_logits(
    tokens: list[list[int]], data: st.DataObject, small_model: Any, stepper: Any
) -> None:
    """Any split of sequences into chunks, in any company, gives the logits of one prefill."""
    together = stepper(small_model, num_blocks=128, seed=data.draw(st.integers(0, 99)))
    left = {f"sequence {index}": list(each) for index, each in enumerate(tokens)}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in left}
    while left:
        names = data.draw(st.sets(st.sampled_from(sorted(left)), min_size=1))
        chunks = {}
        for name in sorted(names):
            size = data.draw(st.one_of(st.just(1), st.integers(1, len(left[name]))))
            chunks[name], left[name] = left[name][:size], left[name][size:]
        for name, logits in together.step(chunks).items():
            found[name].append(logits)
        left = {name: rest for name, rest in left.items() if rest}
    for index, each in enumerate(tokens):
        alone = stepper(small_model).step({"alone": each})["alone"]
        chunked = torch.cat(found[f"sequence {index}"])
        torch.testing.assert_close(chunked, alone, atol=1e-3, rtol=1e-3)


def test_only_the_wanted_rows_get_logits_in_the_order_wanted(
    small_model: Any, stepper: Any
) -> None:
    tokens = {"a": [1, 2, 3], "b": [4, 5]}
    everything = torch.cat(list(stepper(small_model).step(tokens).values()))
    drive = stepper(small_model)
    batch = replace(drive.make_batch(tokens), logits_rows=torch.tensor([4, 2]))
    logits = small_model(batch, drive.cache)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, everything[[4, 2]], atol=1e-4, rtol=1e-4)
    none = replace(batch, logits_rows=torch.tensor([], dtype=torch.int64))
    assert small_model(none, drive.cache).shape == (0, 61)


def test_bfloat16_stays_close_to_float32(demo_model_path: Path, stepper: Any) -> None:
    tokens = [504, 3575, 282, 4649, 314, 7042, 30]
    full, _ = load_model(demo_model_path, dtype=torch.float32, device="cpu")
    half, _ = load_model(demo_model_path, dtype=torch.bfloat16, device="cpu")
    expected = stepper(full).step({"a": tokens})["a"].log_softmax(-1)
    found = stepper(half).step({"a": tokens})["a"].log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.max() < 0.05
