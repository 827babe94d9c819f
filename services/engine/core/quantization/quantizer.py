"""From a model to a directory with its matrices in 4 and 8 bits (docs/models.md)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, outline
from services.engine.core.models.loader import open_model
from services.engine.core.quantization.allocation import Budget, foretold_loss, within_size
from services.engine.core.quantization.layers import LayeredModel, Unit
from services.engine.core.quantization.measuring import (
    BLOCK_SIZE,
    measure_perplexity,
)
from services.engine.core.quantization.meeting import MOST_TRIALS, Trial, meet_perplexity
from services.engine.core.quantization.results import measure_results
from services.engine.core.quantization.rounding import RoundedOnDisk, round_layers
from services.engine.core.quantization.sensitivity import Progress, Sensitivity
from services.engine.core.quantization.sources import open_source
from services.engine.core.quantization.writing import whole_directory, write_model
from services.engine.core.weights.stored_linear import rounded_outline
from services.runtime.modelfiles import ModelFileError

Target: TypeAlias = Literal["int8", "int4", "mixed"]
REPORT = "quantization_report.json"
# Of the directory that is written: where units wait until it is known which of them go in.
_KEPT = "rounded"

# Tokens of a window, as far as the model's context goes; of those that rounding learns from; and
# windows and tokens of each that layers are measured on.
WINDOW_TOKENS = 512
CALIBRATION_TOKENS = 8192
_SENSITIVITY_TOKENS = (2, 128)
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
            torch.tensor(spread(token_ids[:cut], CALIBRATION_TOKENS // window, window)),
            spread(token_ids[cut:], _EVALUATION_WINDOWS, window),
        )


def spread(token_ids: Sequence[int], count: int, window: int) -> list[list[int]]:
    """At most `count` windows of a text, as far from each other as it has room."""
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
    example. Raises ModelFileError for a model that is damaged or cannot be quantised, ValueError
    for a budget that 4 bits are too much for, and FileExistsError where the directory is there;
    whatever happens, no half of it is left.
    """
    with whole_directory(directory) as partial:
        with closing(Run(path, texts, partial, progress)) as run:
            if target == "int8":
                run.write(dict.fromkeys(run.paths, 8))
            elif target == "int4":
                run.round()
                run.write(dict.fromkeys(run.paths, 4))
            else:
                assert budget is not None
                if budget.size is not None:
                    run.spare_bytes(budget.size)
                run.round(is_mixed=True)
                run.mix(budget)
        files(partial)
        report: dict[str, Any] = {
            "model": str(path),
            "to": target,
            "calibration_tokens": texts.calibration.numel(),
            "evaluation_tokens": sum(map(len, texts.evaluation)),
            "budget": None if budget is None else asdict(budget),
            "layers": run.bits,
            "rounded_blindly": run.rounded_blindly,
            "divergences": {
                f"{unit} {width}": each for (unit, width), each in run.divergences.items()
            },
            "foretold_perplexity_ratio": math.exp(foretold_loss(run.bits, run.divergences))
            if run.divergences
            else None,
            "trials": [asdict(trial) for trial in run.trials],
            "results": measure_results(path, partial, texts.evaluation, progress),
            "file_bytes": sum(each.stat().st_size for each in partial.glob("*.safetensors")),
        }
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


class Run:
    """A model that is being quantised into a directory, and what was found out on the way."""

    def __init__(self, path: Path, texts: Texts, directory: Path, progress: Progress) -> None:
        opened = open_model(path)
        self.bits: dict[str, int] = {}
        self.rounded_blindly: dict[str, list[int]] = {}
        self.divergences: dict[tuple[str, int], float] = {}
        self.trials: list[Trial] = []
        self._path, self._texts, self._progress = path, texts, progress
        self._directory, self._opened = directory, opened
        self._kept = RoundedOnDisk(directory / _KEPT)
        try:
            self._source = open_source(opened)
            self._check(opened.config.vocab_size)
            self._model = LayeredModel(opened, texts.calibration)
            layers = range(self._model.num_layers)
            self._units = [unit for index in layers for unit in self._model.units(index)]
            if not self._units:
                problem = f"has no projection whose inputs are whole groups of {GROUP_INPUTS}"
                raise ModelFileError(path, problem)
        except BaseException:
            opened.checkpoint.close()
            raise

    def _check(self, vocab_size: int) -> None:
        largest = max(int(self._texts.calibration.max()), *map(max, self._texts.evaluation))
        if largest >= vocab_size:
            problem = f"has {vocab_size} tokens, and its tokenizer knows more: token {largest}"
            raise ModelFileError(self._path, problem)

    @property
    def paths(self) -> list[str]:
        """Of all units."""
        return [unit.path for unit in self._units]

    def close(self) -> None:
        """Leave nothing but the model that was written last."""
        self._opened.checkpoint.close()
        shutil.rmtree(self._directory / _KEPT)

    def round(self, *, compensate: bool = True, is_mixed: bool = False) -> None:
        """Round all units to 4 bits, to be written as often as wanted; measure them for `mix`."""
        windows, tokens = _SENSITIVITY_TOKENS
        sensitivity = (
            Sensitivity(self._model.on(self._texts.calibration[:windows, :tokens]))
            if is_mixed
            else None
        )
        self.rounded_blindly = round_layers(
            self._model,
            self._kept,
            self._progress,
            compensate=compensate,
            sensitivity=sensitivity,
        )
        if sensitivity is not None:
            self.divergences = sensitivity.divergences()

    def spare_bytes(self, size: float) -> int:
        """What a budget of memory leaves when all units have 4 bits; raises ValueError for one
        that is too small for that."""
        fixed, whole = _sizes(self._path, self._units)
        least = fixed + sum(unit.kept_bytes(4) for unit in self._units)
        if int(size * whole) < least:
            share = math.ceil(100 * least / whole) / 100
            raise ValueError(f"4 bits take {share:.2f}x of what 16 take, and no {size:g}x")
        return int(size * whole) - least

    def mix(self, budget: Budget) -> None:
        """Write the model with each unit in bits of its own, once all were rounded and measured."""
        if budget.size is not None:
            spare = self.spare_bytes(budget.size)
            self.write(within_size(self._units, self.divergences, spare))
            return
        assert budget.perplexity is not None
        texts, done = self._texts.evaluation, 0
        self._progress("measuring mixtures", done, MOST_TRIALS)
        reference = measure_perplexity(open_model(self._path), texts, "bfloat16")

        def measured(bits: dict[str, int]) -> float:
            nonlocal done
            self.write(bits)
            found = measure_perplexity(open_model(self._directory), texts)
            done += 1
            self._progress("measuring mixtures", done, MOST_TRIALS)
            return found / reference

        bits, self.trials = meet_perplexity(
            self._units, self.divergences, budget.perplexity, measured
        )
        self._progress("measuring mixtures", MOST_TRIALS, MOST_TRIALS)
        if bits != self.bits:
            self.write(bits)

    def write(self, bits: dict[str, int]) -> None:
        """Write the model with these bits of its units, over one that was written before."""
        for file in self._directory.glob("*.safetensors*"):
            file.unlink()
        write_model(self._model, self._source, self._kept, bits, self._directory)
        self.bits = bits


def _sizes(path: Path, units: list[Unit]) -> tuple[int, int]:
    """Bytes in memory of all matrices that are not among `units`, and of all in 16 bits."""
    skeleton = open_model(path).skeleton
    inner = {unit.path for unit in units}
    fixed, whole = 0, sum(unit.kept_bytes(16) for unit in units)
    for name, module in skeleton.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or name in inner:
            continue
        own = outline(weight).num_bytes
        whole += own
        # The logits' matrix of a quantised model is kept in 8 bits.
        is_head = name == "head" or (name == "embedding" and skeleton.head is None)
        fixed += outline(rounded_outline(tuple(weight.shape))).num_bytes if is_head else own
    return fixed, whole
