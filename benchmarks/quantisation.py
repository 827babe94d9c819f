"""What quantising a model takes from it, gives back, and gains: perplexity, memory and speed.

    python -m benchmarks.quantisation --budgets 0.45x 1.05ppl

The demo model's file is in 4 bits already, in groups of 32 inputs with minima. To round those
groups again would show who finds the file's levels, and nothing of rounding. So the model is first
written in 16 bits with the dimensions of its residual stream, of its feed-forward layers and of its
heads' values in another order: it computes the same (the first two lines say so), and a group of 32
inputs holds weights of many of the file's groups.

Rounding learns from the Python language reference. Perplexity is that of another text: what the
packages of requirements.lock say of themselves, which pip installs beside them. "rounded to
nearest" is the same format without learning; "at loading" is what `models.NAME.weights` does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.prompts import english_token_ids
from services.engine.core.kernels import cpu, select
from services.engine.core.models.loader import open_model
from services.engine.core.models.precision import WeightChoice
from services.engine.core.quantization.allocation import Budget
from services.engine.core.quantization.measuring import (
    Measured,
    measure,
    perplexity,
    torch_step,
)
from services.engine.core.quantization.quantizer import Run, Texts, spread
from services.engine.core.quantization.sources import open_source
from services.runtime.modelfiles import locate
from services.tokenizer.model_tokenizer import load_model_tokenizer

_MIB = 2**20
_LOCK = Path(__file__).parent.parent / "requirements.lock"


def main() -> None:
    """Print a table: one line for each way of keeping weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="a .gguf file of Llama's shape")
    parser.add_argument("--tokens", type=int, default=6144, help="of which perplexity is measured")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for the models; else they go")
    parser.add_argument(
        "--budgets", nargs="*", default=["0.40x", "0.45x", "0.50x", "1.10ppl", "1.05ppl", "1.02ppl"]
    )
    options = parser.parse_args()
    select("cpu")
    cpu.activate("auto")
    learned = Texts.of(english_token_ids(options.model), options.window).calibration
    words = load_model_tokenizer(locate(options.model)).encode(readmes()).token_ids
    windows = spread(words, options.tokens // options.window, options.window)
    texts = Texts(learned, windows)
    with tempfile.TemporaryDirectory() as temporary:
        place = options.keep or Path(temporary)
        original = place / "original"
        write_reordered(locate(options.model), original)
        for name, path in (("the file", locate(options.model)), ("in another order", original)):
            found = perplexity(torch_step(open_model(path), options.window), windows)
            print(f"{name}, float32 on torch: {found:.3f}", flush=True)
        _measure(original, place, texts, options.budgets)


def _measure(original: Path, place: Path, texts: Texts, budgets: list[str]) -> None:
    print("\n| weights | memory | perplexity | | prompt tokens/s | decode tokens/s | matrices |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    whole = measure(open_model(original), "bfloat16", texts.evaluation)
    _print("bfloat16", whole, whole)
    choices: tuple[WeightChoice, ...] = ("int8", "int4")
    for choice in choices:
        found = measure(open_model(original), choice, texts.evaluation)
        _print(f"{choice}, rounded at loading", found, whole)

    def write(name: str, run: Run, directory: Path) -> None:
        kept = shutil.copytree(directory, place / name, ignore=shutil.ignore_patterns("rounded"))
        found = measure(open_model(kept), "auto", texts.evaluation)
        _print(name, found, whole, run.bits)
        for trial in run.trials:
            print(f"    tried: {trial}", flush=True)

    for compensate in (False, True):
        directory = place / f"compensate {compensate}"
        directory.mkdir(parents=True)
        with closing(Run(original, texts, directory, lambda *_: None)) as run:
            if compensate:
                run.write(dict.fromkeys(run.paths, 8))
                write("int8", run, directory)
            run.round(compensate=compensate, is_mixed=compensate and bool(budgets))
            run.write(dict.fromkeys(run.paths, 4))
            write("int4" if compensate else "int4, rounded to nearest", run, directory)
            for budget in budgets if compensate else ():
                run.mix(Budget.parse(budget))
                write(f"mixed, {budget}", run, directory)


def readmes() -> str:
    """The descriptions of the packages that are pinned, as far as they are installed, by name."""
    names = re.findall(r"^([\w.-]+)==", _LOCK.read_text(), re.MULTILINE)
    texts = []
    for name in sorted(set(names)):
        try:
            texts.append(str(importlib.metadata.metadata(name).get_payload()))
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n\n".join(texts)


def write_reordered(path: Path, directory: Path) -> None:
    """Write a GGUF model of Llama's shape as a HF directory in bf16, with its dimensions in another
    order: it computes the same."""
    opened = open_model(path)
    with closing(opened.checkpoint):
        source, config = open_source(opened), opened.config
        generator = torch.Generator().manual_seed(0)

        def order(size: int) -> Tensor:
            return torch.randperm(size, generator=generator)

        hidden = order(config.hidden_size)
        inner = [order(config.intermediate_size) for _ in range(config.num_layers)]
        values = [
            [order(config.head_dim) for _ in range(config.kv_heads)]
            for _ in range(config.num_layers)
        ]
        tensors = {}
        for name, tensor in source.others(()):
            found = re.search(r"layers\.(\d+)\.", name)
            index = int(found[1]) if found else 0
            part = name.split(".")[-2]
            if part == "down_proj":
                tensor = tensor[hidden][:, inner[index]]
            elif part == "o_proj":
                tensor = tensor[hidden][:, _of_heads(values[index], config.heads)]
            elif tensor.dim() == 1:
                tensor = tensor[hidden]
            else:
                tensor = tensor[:, hidden]
                if part in ("gate_proj", "up_proj"):
                    tensor = tensor[inner[index]]
                elif part == "v_proj":
                    tensor = tensor[_of_heads(values[index], config.kv_heads)]
            tensors[name] = tensor.contiguous()
        directory.mkdir(parents=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(source.config))


def _of_heads(orders: Sequence[Tensor], heads: int) -> Tensor:
    """The order of all heads' dimensions, those of a KV head in each of the heads that share it."""
    repeated = itertools.chain.from_iterable([each] * (heads // len(orders)) for each in orders)
    return torch.cat([head * len(each) + each for head, each in enumerate(repeated)])


def _widths(layers: Mapping[str, int]) -> str:
    return ", ".join(
        f"{sum(each == bits for each in layers.values())} in {bits}"
        for bits in sorted(set(layers.values()))
    )


def _print(
    name: str, found: Measured, whole: Measured, bits: Mapping[str, int] | None = None
) -> None:
    print(
        f"| {name} | {found.total_bytes / _MIB:.1f} MiB | {found.perplexity:.3f}"
        f" | {100 * (found.perplexity / whole.perplexity - 1):+.2f} %"
        f" | {found.speed.prompt_tokens_per_s:,.0f} | {found.speed.decode_tokens_per_s:,.0f}"
        f" | {'' if bits is None else _widths(bits)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
