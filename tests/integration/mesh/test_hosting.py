"""Two real engines, whose models operators load, unload and put to sleep while the mesh runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import meshserve
from tests.fakes.adapters import ALL_LINEAR, add_adapters, logits_of
from tests.fakes.small_llama import save_small_llama
from tests.fakes.small_tokenizers import VOCABULARY, save_small_tokenizer
from tests.support.mesh import Mesh
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

QUESTION: dict[str, Any] = {
    "model": "small",
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
    "cache": False,
}


PROMPT = [7, 11, 30, 5]


class TwoEngines:
    """A mesh, and a second engine that a test may end and start."""

    def __init__(self, mesh: Mesh, settings: dict[str, Any], folder: Path) -> None:
        self.mesh = mesh
        self._settings = settings
        self._folder = folder

    @contextmanager
    def second(self) -> Iterator[ServiceProcess]:
        with ServiceProcess("engine", self._folder, self._settings) as process:
            process.wait_until_healthy()
            with self.mesh.client() as client:
                wait_until(lambda: len(self.states(client)) == 2, "both engines tell")
            yield process

    def states(self, client: meshserve.Client, model: str = "small") -> list[str]:
        (hosted,) = (each for each in client.admin.models() if each.name == model)
        return [replica.state for replica in hosted.replicas if replica.state]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoEngines]:
    folder = tmp_path_factory.mktemp("hosting")
    model = folder / "model"
    save_small_llama(model, len(VOCABULARY))
    save_small_tokenizer(model)
    first, second, metrics = free_ports(3)
    mesh = Mesh(
        folder / "mesh",
        {
            "models": {
                "small": {"source": str(model), "dtype": "float32"},
                "other": {"source": str(model), "dtype": "float32", "load": "by_operator"},
            },
            "engine": {
                "listen": f"127.0.0.1:{first}",
                "target": f"ipv4:127.0.0.1:{first},127.0.0.1:{second}",
                "kv_cache_bytes": 2**20,
            },
        },
    )
    mesh.ports["engine"] = first
    del mesh.settings["models"]["smollm2-135m"]
    settings = copy.deepcopy(mesh.settings)
    settings["engine"]["listen"] = f"127.0.0.1:{second}"
    settings["engine"]["metrics_listen"] = f"127.0.0.1:{metrics}"
    with mesh:
        yield TwoEngines(mesh, settings, folder / "second")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, list[int]]]:
    """The folder of the adapters `red` and `blue`, and what follows PROMPT by them and by none, as
    PEFT computes it."""
    folder = tmp_path_factory.mktemp("adapters")
    save_small_llama(folder / "model", len(VOCABULARY))
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    model = add_adapters(base, folder, red=ALL_LINEAR, blue=ALL_LINEAR | {"r": 4})
    answers: dict[str | None, list[int]] = {}
    for name in (None, "red", "blue"):
        tokens = list(PROMPT)
        for _ in range(12):
            tokens.append(int(logits_of(model, tokens, name)[-1].argmax()))
        answers[name] = tokens[len(PROMPT) :]
    assert len(set(map(tuple, answers.values()))) == 3
    return folder, answers


def test_models_come_and_go_on_both_engines_and_stay_as_asked(engines: TwoEngines) -> None:
    with engines.mesh.client() as client:
        with engines.second():
            assert engines.states(client) == ["ready", "ready"]
            answer = client.generate("abc", **QUESTION).text
            with pytest.raises(meshserve.FailedPreconditionError) as error:
                client.generate("abc", **QUESTION | {"model": "other"})
            assert error.value.reason == "MODEL_NOT_LOADED"
            client.admin.load_model("other")
            assert client.generate("abc", **QUESTION | {"model": "other"}).text == answer
            unloaded = client.admin.unload_model("small")
            assert (unloaded.state, unloaded.problems) == ("unloaded", ())
            with pytest.raises(meshserve.FailedPreconditionError):
                client.generate("abc", **QUESTION)
        # What starts anew loads `small`, as its settings say, and is told better.
        with engines.second():
            wait_until(lambda: engines.states(client) == ["unloaded"] * 2, "small is unloaded")
            wait_until(lambda: engines.states(client, "other") == ["ready"] * 2, "other is loaded")
            loaded = client.admin.load_model("small")
            assert [replica.state for replica in loaded.replicas] == ["ready", "ready"]
            assert client.generate("abc", **QUESTION).text == answer


def test_a_sleeping_model_is_woken_by_the_next_request(engines: TwoEngines) -> None:
    with engines.mesh.client() as client:
        wait_until(lambda: "ready" in engines.states(client), "the first engine has it")
        answer = client.generate("abc", **QUESTION).text
        asleep = client.admin.sleep_model("small")
        assert asleep.state == "sleeping"
        assert client.model("small").ready, "it takes requests"
        assert client.generate("abc", **QUESTION).text == answer
        assert "ready" in engines.states(client)


def test_adapters_are_there_on_both_engines_by_name_while_others_stream(
    engines: TwoEngines, adapted: tuple[Path, dict[str | None, list[int]]]
) -> None:
    folder, expected = adapted

    def ask(client: meshserve.Client, model: str) -> list[int]:
        answer = client.generate(PROMPT, **QUESTION | {"model": model}, return_token_ids=True)
        return list(answer.choices[0].token_ids)

    with engines.mesh.client() as client, ThreadPoolExecutor(8) as pool:
        long = QUESTION | {"max_tokens": 400}
        undisturbed = client.generate("abc", **long).text
        with engines.second():
            streams = [client.stream_generate("abc", **long) for _ in range(2)]
            texts = [pool.submit(lambda each: each.collect().text, each) for each in streams]
            red = client.admin.load_adapter("colour", str(folder / "red"), model="small")
            assert [replica.loaded for replica in red.replicas] == [True, True]
            assert [each.result() for each in texts] == [undisturbed] * 2
            names = ["colour", "small", "small:colour", "small"] * 4
            answers = pool.map(lambda name: ask(client, name), names)
            assert list(answers) == [expected["red"], expected[None]] * 8
            with pytest.raises(meshserve.NotFoundError) as error:
                ask(client, "small:color")
            assert error.value.metadata["nearest"] == "colour"
            with pytest.raises(meshserve.InvalidRequestError):
                client.admin.load_adapter("broken", str(folder), model="small")
            client.admin.load_adapter("colour", str(folder / "blue"), model="small")
            answers = pool.map(lambda name: ask(client, name), names)
            assert list(answers) == [expected["blue"], expected[None]] * 8
        with engines.second():
            wait_until(
                lambda: all(each.loaded for each in client.admin.adapters("small")[0].replicas),
                "the engine that has started anew has the adapter",
            )
            answers = pool.map(lambda name: ask(client, name), names)
            assert list(answers) == [expected["blue"], expected[None]] * 8
            client.admin.sleep_model("small")
            assert ask(client, "colour") == expected["blue"], "it wakes with its adapters"
            gone = client.admin.unload_adapter("colour")
            assert [each.loaded for each in gone] == [False, False]
            with pytest.raises(meshserve.NotFoundError):
                ask(client, "colour")
            assert client.admin.adapters() == []
