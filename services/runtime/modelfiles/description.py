"""What a model on disk is, in the words that a user is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.runtime.modelfiles.errors import ModelFileError
from services.runtime.modelfiles.fields import read_json
from services.runtime.modelfiles.gguf_model import GGUFModel
from services.runtime.modelfiles.precision import StoredAs, kept_weights, read_quantization
from services.runtime.modelfiles.safetensors_file import StoredTensor, read_header


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model's outline, read from its headers alone.

    `dtype` is what most of the parameters are stored as; lengths are in tokens.
    """

    path: Path
    kind: Literal["gguf", "hf"]
    name: str
    architecture: str
    num_parameters: int
    max_context_tokens: int | None
    dtype: str
    kept: str  # how a CPU keeps its matrices where the settings leave it open
    kept_on_gpu: str | None  # how a GPU does, where that is said apart
    vocab_size: int | None
    has_chat_template: bool
    licence: str | None
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def describe(path: Path | str) -> ModelDescription:
    """Describe a .gguf file or a Hugging Face model directory.

    Raises ModelFileError for what is missing, damaged or neither of the two.
    """
    path = Path(path)
    return _describe_directory(path) if path.is_dir() else _describe_gguf(path)


def _describe_gguf(path: Path) -> ModelDescription:
    with GGUFModel(path) as file:
        metadata = file.metadata
        architecture = metadata.string("general.architecture")
        embedding = file.tensors.get("token_embd.weight")
        context = f"{architecture}.context_length"
        return ModelDescription(
            path=path,
            kind="gguf",
            name=metadata.string("general.name", path.stem),
            architecture=architecture,
            num_parameters=sum(info.num_elements for info in file.tensors.values()),
            max_context_tokens=metadata.integer(context) if context in metadata else None,
            dtype=_commonest((info.type.name, info.num_elements) for info in file.tensors.values()),
            kept=kept_weights(
                info.type.name for info in file.tensors.values() if len(info.shape) > 1
            ),
            kept_on_gpu=None,
            vocab_size=embedding.shape[0] if embedding else None,
            has_chat_template="tokenizer.chat_template" in metadata,
            licence=metadata.string("general.license", "") or None,
            files=file.files,
        )


def _describe_directory(path: Path) -> ModelDescription:
    config = read_json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelFileError(path, "holds no .safetensors file")
    quantization = read_quantization(config)
    sizes = [
        (entry.dtype, _num_parameters(name, entry, quantization))
        for file in files
        for name, entry in read_header(file).items()
    ]
    architectures = config.get("architectures")
    tokenizer_path = path / "tokenizer_config.json"
    tokenizer = read_json(tokenizer_path) if tokenizer_path.exists() else {}
    known = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    beside = [path / name for name in (*known, "chat_template.jinja") if (path / name).exists()]
    return ModelDescription(
        path=path,
        kind="hf",
        name=path.resolve().name,
        architecture=str(architectures[0])
        if isinstance(architectures, list) and architectures
        else str(config.get("model_type", "unknown")),
        num_parameters=sum(size for _, size in sizes),
        max_context_tokens=_integer(config, "max_position_embeddings"),
        dtype=_commonest(sizes) if quantization is None else quantization.name,
        kept=kept_weights((dtype for dtype, _ in sizes), quantization),
        kept_on_gpu=None if quantization is None else quantization.kept_on_gpu,
        vocab_size=_integer(config, "vocab_size"),
        has_chat_template="chat_template" in tokenizer or path / "chat_template.jinja" in beside,
        licence=None,
        files=(*files, *beside),
    )


def _num_parameters(name: str, entry: StoredTensor, quantization: StoredAs | None) -> int:
    """What a tensor adds to the model's own parameters: scales and orders add none."""
    if quantization is None:
        return entry.num_elements
    kind = name.rpartition(".")[2]
    if kind in ("qweight", "weight_packed"):
        return entry.num_elements * 32 // quantization.bits
    return entry.num_elements if kind in ("weight", "bias") else 0


def _commonest(sizes: Iterable[tuple[str, int]]) -> str:
    totals: Counter[str] = Counter()
    for dtype, num_elements in sizes:
        totals[dtype] += num_elements
    return max(totals, key=lambda dtype: totals[dtype], default="unknown")


def _integer(config: dict[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int else None
