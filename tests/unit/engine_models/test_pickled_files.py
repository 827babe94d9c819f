"""Pickled weights are loaded only where that is asked for, and then nothing but tensors."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.models.loader import open_model
from services.runtime.modelfiles import ModelFileError

TOKENS = [1, 5, 90, 33, 7, 7, 61, 12]


class Harmful:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickled(directory: Path, state: Any, name: str = "pytorch_model.bin") -> Path:
    (directory / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, directory / name)
    return directory / name


def test_pickled_weights_are_refused_unless_they_are_asked_for(
    make_checkpoint: Any, stepper: Any
) -> None:
    directory, reference = make_checkpoint()
    pickled(directory, reference.state_dict())
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin.*run code.*allow_pickled"):
        open_model(directory)
    opened = open_model(directory, allow_pickled=True)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    found = stepper(opened.load(torch.float32, "cpu")).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_shards_and_tied_weights_are_read(make_checkpoint: Any) -> None:
    directory, reference = make_checkpoint(tie_word_embeddings=True)
    state = reference.state_dict()
    names = sorted(state)
    shards = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(names)}
    for shard in set(shards.values()):
        pickled(directory, {name: state[name] for name in names if shards[name] == shard}, shard)
    index = {"weight_map": shards}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = open_model(directory, allow_pickled=True).load(torch.float32, "cpu")
    assert torch.equal(model.embedding.weight, reference.model.embed_tokens.weight)


def test_safetensors_are_preferred(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    (directory / "pytorch_model.bin").write_bytes(b"no pickle")
    open_model(directory, allow_pickled=True)


def test_code_in_a_pickle_does_not_run(make_checkpoint: Any, tmp_path: Path) -> None:
    directory, reference = make_checkpoint()
    sign = tmp_path / "it ran"
    pickled(directory, reference.state_dict() | {"model.norm.weight": Harmful(sign)})
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin: cannot be loaded as weights"):
        open_model(directory, allow_pickled=True)
    assert not sign.exists()


def test_a_plain_pickle_is_not_loaded(make_checkpoint: Any, tmp_path: Path) -> None:
    directory, _ = make_checkpoint()
    sign = tmp_path / "it ran"
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(sign)))
    with pytest.raises(ModelFileError, match=r"is no archive of torch\.save"):
        open_model(directory, allow_pickled=True)
    assert not sign.exists()


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("state", "damage", "message"),
    [
        ({"a": torch.zeros(1).expand(1 << 40)}, None, "'a': is larger than what is stored of it"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, None, "'a': torch.complex64 cannot be"),
        ({"a": torch.eye(3).to_sparse()}, None, "'a': torch.float32 cannot be read"),
        ({"a": 7}, None, "'a': is no tensor with a name"),
        ({7: torch.zeros(1)}, None, "7: is no tensor with a name"),
        ([torch.zeros(1)], None, "is not a table of tensors"),
        ({"a": torch.zeros(9)}, compress, "is compressed"),
        ({"a": torch.zeros(9)}, cut, "is no archive of torch.save"),
        (dict.fromkeys(map(str, range(99)), torch.zeros(9999)), None, "before it claim"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(
    state: Any, damage: Callable[[Path], None] | None, message: str, make_checkpoint: Any
) -> None:
    directory, _ = make_checkpoint()
    path = pickled(directory, state)
    if damage is not None:
        damage(path)
    with pytest.raises(ModelFileError, match=rf"pytorch_model\.bin: .*{message}"):
        open_model(directory, allow_pickled=True)
