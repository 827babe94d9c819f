"""From a model to a directory with its matrices in 4 and 8 bits (docs/models.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, outline
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.models.loader import OpenedModel, open_model
from services.engine.core.models.native import WeightChoice
from services.engine.core.quantization.gptq import round_with_compensation
from services.engine.core.quantization.grid import Rounded, round_to_nearest
from services.engine.core.quantization.layers import (
    InputProducts,
    LayeredModel,
    Unit,
    projections,
)
from services.engine.core.quantization.measuring import BLOCK_SIZE, Measured, measure
from services.engine.core.quantization.sensitivity import (
    Budget,
    Progress,
    allocate,
    foretold_ratio,
    measure_divergences,
)
from services.engine.core.quantization.sources import Source, open_source
from services.engine.core.quantization.writing import (
    ShardWriter,
    packed_parts,
    quantization_config,
    whole_directory,
)
from services.engine.core.weights.stored_linear import rounded_outline
from services.runtime.modelfiles import ModelFileError

Target: TypeAlias = Literal["int8", "int4", "mixed"]
REPORT = "quantization_report.json"

# Tokens of a window, as far as the model's context goes; of those that rounding learns from; and
# windows and tokens of each that layers are measured on.
WINDOW_TOKENS = 512
CALIBRATION_TOKENS = 8192
_SENSITIVITY_TOKENS = (2, 256)
_EVALUATION_WINDOWS = 8
_LEAST_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of token ids: rounding learns from `calibration` and is measured on `evaluation`."""

    calibration: Tensor  # [num_windows, tokens]
    evaluation: list[list[int]]

    @staticmethod
    def of(token_ids: Sequence[int], context_tokens: int) -> Texts:
        """Cut a text in two, its last fifth for evaluation, and take windows spread over each.

        Raises ValueError for a text, or a context of the model, that is too short.
        """
        window = min(WINDOW_TOKENS, context_tokens // BLOCK_SIZE * BLOCK_SIZE)
        least = _LEAST_WINDOWS * window
        if window == 0 or len(token_ids) < least:
            raise ValueError(f"a text of {len(token_ids)} tokens is too short: {least} are needed")
        # Two windows at least, for a fifth of the least is less than one.
        cut = min(len(token_ids) * 4 // 5, len(token_ids) - 2 * window)
        return Texts(
            torch.tensor(_spread(token_ids[:cut], CALIBRATION_TOKENS // window, window)),
            _spread(token_ids[cut:], _EVALUATION_WINDOWS, window),
        )


def _spread(token_ids: Sequence[int], count: int, window: int) -> list[list[int]]:
    count = min(count, len(token_ids) // window)
    step = (len(token_ids) - window) // max(count - 1, 1)
    return [list(token_ids[at * step : at * step + window]) for at in range(count)]


def quantize(
    path: Path,
    directory: Path,
    target: Target,
    texts: Texts,
    *,
    budget: Budget | None = None,
    files: Callable[[Path], None] = lambda directory: None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write a model quantised to `directory`, measured; return the report that lies in it.

    budget: of `mixed`. files: puts into a directory what else belongs to a model, its tokenizer for
    example. Raises ModelFileError for a model that is damaged or cannot be quantised and
    FileExistsError where the directory is there; whatever happens, no half of it is left.
    """
    with whole_directory(directory) as partial:
        opened = open_model(path)
        with closing(opened.checkpoint):
            source = open_source(opened)
            bits, divergences = _choose(path, target, texts, budget, progress)
            if not bits:
                problem = f"has no projection whose inputs are whole groups of {GROUP_INPUTS}"
                raise ModelFileError(path, problem)
            _write(opened, source, bits, texts, partial, progress)
        files(partial)
        report: dict[str, Any] = {
            "model": str(path),
            "to": target,
            "calibration_tokens": texts.calibration.numel(),
            "evaluation_tokens": sum(map(len, texts.evaluation)),
            "budget": None if budget is None else asdict(budget),
            "foretold_perplexity_ratio": foretold_ratio(bits, divergences) if divergences else None,
            "layers": bits,
            "divergences": {f"{unit} {width}": each for (unit, width), each in divergences.items()},
            "results": _results(path, partial, texts, progress),
            "file_bytes": sum(each.stat().st_size for each in partial.glob("*.safetensors")),
        }
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _choose(
    path: Path, target: Target, texts: Texts, budget: Budget | None, progress: Progress
) -> tuple[dict[str, int], dict[tuple[str, int], float]]:
    """The bits of every projection that can be rounded, and what each was found to cost."""
    windows, tokens = _SENSITIVITY_TOKENS
    opened = open_model(path)
    with closing(opened.checkpoint):
        model = LayeredModel(opened, texts.calibration[:windows, :tokens])
        units = [unit for index in range(model.num_layers) for unit in model.units(index)]
        if target != "mixed":
            return {unit.path: 8 if target == "int8" else 4 for unit in units}, {}
        divergences = measure_divergences(model, progress)
    whole, fixed = _sizes(path, units)
    assert budget is not None
    return allocate(units, divergences, budget, fixed, whole), divergences


def _sizes(path: Path, units: list[Unit]) -> tuple[int, int]:
    """Bytes in memory of all matrices in 16 bits, and of those that are not among `units`."""
    skeleton = open_model(path).skeleton
    inner = {unit.path for unit in units}
    whole, fixed = sum(unit.kept_bytes(16) for unit in units), 0
    for name, module in skeleton.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or name in inner:
            continue
        own = outline(weight).num_bytes
        whole += own
        # The logits' matrix of a quantised model is kept in 8 bits.
        is_head = name == "head" or (name == "embedding" and skeleton.head is None)
        fixed += outline(rounded_outline(tuple(weight.shape))).num_bytes if is_head else own
    return whole, fixed


def round_layers(
    model: LayeredModel,
    bits: Mapping[str, int],
    take: Callable[[Unit, Rounded], None],
    progress: Progress,
    *,
    compensate: bool = True,
) -> None:
    """Round projections layer by layer, each on what the rounded layers before it give."""
    needs_text = compensate and 4 in bits.values()
    hidden = model.embed() if needs_text else torch.empty(0)
    for index in range(model.num_layers):
        progress("rounding layers", index, model.num_layers)
        layer = model.layer(index)
        units = [unit for unit in model.units(index) if bits[unit.path] < 16]
        modules = projections(layer, units)
        narrow = {unit.path: modules[unit.path] for unit in units if bits[unit.path] == 4}
        products: dict[str, Tensor] = {}
        if narrow and needs_text:
            with InputProducts(narrow) as inputs:
                model.run(layer, hidden)
            products = inputs.products
        for unit in units:
            weight = modules[unit.path].weight.data
            rounded = (
                round_with_compensation(weight, bits[unit.path], products[unit.path])
                if unit.path in products
                else round_to_nearest(weight, bits[unit.path])
            )
            weight.copy_(rounded.dequantize())
            take(unit, rounded)
        if needs_text:
            hidden = model.run(layer, hidden)
    progress("rounding layers", model.num_layers, model.num_layers)


def _write(
    opened: OpenedModel,
    source: Source,
    bits: Mapping[str, int],
    texts: Texts,
    directory: Path,
    progress: Progress,
) -> None:
    writer, modules, rounded_names = ShardWriter(directory), {}, []

    def take(unit: Unit, rounded: Rounded) -> None:
        start = 0
        for name, rows in unit.parts:
            module = source.name_of(name).removesuffix(".weight")
            writer.add(packed_parts(module, rounded, slice(start, start + rows)))
            modules[module] = rounded.grid.bits
            rounded_names.append(name)
            start += rows

    round_layers(LayeredModel(opened, texts.calibration), bits, take, progress)
    left = ["lm_head"]
    for name, tensor in source.others(rounded_names):
        writer.add({name: tensor.contiguous()})
        if tensor.dim() == 2 and name.endswith(".weight"):
            left.append(name.removesuffix(".weight"))
    writer.finish()
    config = source.config | {
        "quantization_config": quantization_config(modules, sorted(set(left)))
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _results(
    path: Path, directory: Path, texts: Texts, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Size, perplexity and speed of the quantised model and of the ways that loading rounds."""
    cases: dict[str, tuple[Path, WeightChoice]] = {
        "bfloat16": (path, "bfloat16"),
        "as it was": (path, "auto"),
        "int8, rounded at loading": (path, "int8"),
        "int4, rounded at loading": (path, "int4"),
        "quantised": (directory, "auto"),
    }
    found: dict[str, Measured] = {}
    for done, (name, (each, weights)) in enumerate(cases.items()):
        progress("measuring what came of it", done, len(cases))
        try:
            found[name] = measure(open_model(each), weights, texts.evaluation)
        except UnsupportedModelError:
            continue
    progress("measuring what came of it", len(cases), len(cases))
    reference = found["bfloat16"].perplexity
    return {
        name: {
            "bytes": each.total_bytes,
            "by_format": each.weight_bytes,
            "perplexity": each.perplexity if math.isfinite(each.perplexity) else None,
            "perplexity_ratio": each.perplexity / reference,
            "prompt_tokens_per_s": each.prompt_tokens_per_s,
            "decode_tokens_per_s": each.decode_tokens_per_s,
        }
        for name, each in found.items()
    }
