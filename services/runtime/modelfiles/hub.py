"""Models from the Hugging Face hub, by way of huggingface_hub where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.runtime.modelfiles.errors import ModelStoreError

# Pickled weights are never fetched: they are never loaded either.
# Of a model, and of an adapter.
_CONFIGS = ("config.json", "adapter_config.json")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]


def pull(
    repository: str, revision: str | None, hub_dir: Path, progress: Callable[[str, int, int], None]
) -> Path:
    """Fetch a repository's safetensors, configuration and tokenizer; return its directory.

    Raises ModelStoreError for whatever keeps it from that.
    """
    progress(f"downloading {repository}", 0, 0)
    found = _snapshot(repository, revision, hub_dir, local_files_only=False)
    if not any((found / name).exists() for name in _CONFIGS) or not any(
        found.glob("*.safetensors")
    ):
        raise _holds_none(repository, revision)
    return found


def locate(
    repository: str, revision: str | None, hub_dir: Path, *, config: str = "config.json"
) -> Path:
    """Return the directory of a repository fetched before, with a configuration of this name;
    raises ModelStoreError."""
    found = _snapshot(repository, revision, hub_dir, local_files_only=True)
    if not (found / config).exists() or not any(found.glob("*.safetensors")):
        raise _holds_none(repository, revision, config)
    return found


def _holds_none(
    repository: str, revision: str | None, config: str = "config.json"
) -> ModelStoreError:
    name = f"{repository}@{revision}" if revision else repository
    return ModelStoreError(
        f"{name} holds no {config} with safetensors beside it.",
        way_out="Choose a repository with safetensors weights, or download its .gguf file and "
        "give the path.",
    )


def _snapshot(
    repository: str, revision: str | None, hub_dir: Path, *, local_files_only: bool
) -> Path:
    download = _snapshot_download(repository)
    name = f"{repository}@{revision}" if revision else repository
    try:
        found = Path(
            download(
                repository,
                revision=revision,
                cache_dir=hub_dir,
                allow_patterns=_WANTED,
                local_files_only=local_files_only,
            )
        )
    # The hub's client raises its own, its HTTP library's and the system's errors.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if local_files_only:
            raise ModelStoreError(
                f"{name} has not been fetched to {hub_dir}.",
                way_out=f"Run `meshserve models pull {name}`.",
            ) from error
        raise ModelStoreError(
            f"{name} could not be fetched from the hub: {reason}",
            way_out="Check the name, the network and, for gated models, HF_TOKEN; or download it "
            "elsewhere and give the path of its directory.",
        ) from error
    return found


def _snapshot_download(repository: str) -> Callable[..., Any]:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelStoreError(
            f"{repository} is a hub id, and huggingface_hub is not installed.",
            way_out="Run `pip install huggingface_hub`, or give the path of a model on disk.",
        ) from None
    return snapshot_download
