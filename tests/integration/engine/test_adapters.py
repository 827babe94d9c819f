"""Adapters over the engine's RPCs and a real core process: loaded, used, unloaded, found again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.settings import CoreSettings
from services.runtime.errors import Reason, ServiceError
from tests.fakes.adapters import ALL_LINEAR, add_adapters
from tests.fakes.decoder_families import save_model
from tests.support.engine_server import EngineServer, engine_server
from tests.support.waiting import until

PROMPT = [7, 3, 90, 12, 55] * 8  # two blocks and a half
COMPLETION_TOKENS = 12


class Adapted:
    """A small Llama with three adapters as PEFT has it, and where they lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = save_model("llama", path / "model", max_position_embeddings=256)
        self.model = add_adapters(
            model,
            path,
            a={"r": 8, **ALL_LINEAR},
            b={"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
            c={"r": 20, "target_modules": ["down_proj"], "use_rslora": True},
        )

    def expected(self, adapter: str | None, num_tokens: int = COMPLETION_TOKENS) -> list[int]:
        """The greedy completion through an adapter, or none."""
        through = contextlib.nullcontext() if adapter else self.model.disable_adapter()
        if adapter:
            self.model.set_adapter(adapter)
        with through:
            ids = self.model.generate(
                input_ids=torch.tensor([PROMPT]),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        return ids[0, len(PROMPT) :].tolist()

    def settings(self, **fields: Any) -> CoreSettings:
        return CoreSettings(
            model_path=str(self.path / "model"),
            device="cpu",
            dtype="float32",
            threads=1,
            kv_cache_memory_bytes=1 << 24,
            **fields,
        )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapted"))


def request(adapter: str = "", tokens: int = COMPLETION_TOKENS, **fields: Any) -> Any:
    return engine_pb2.EngineServiceGenerateRequest(
        request_id=fields.pop("request_id", f"{adapter} {os.urandom(4).hex()}"),
        prompt=types_pb2.TokenIds(ids=PROMPT),
        adapter=adapter,
        sampling=types_pb2.SamplingParams(temperature=0.0),
        stopping=types_pb2.StoppingCriteria(max_tokens=tokens, ignore_eos=True),
        **fields,
    )


async def generate(
    engine: EngineServer, adapter: str = "", tokens: int = COMPLETION_TOKENS
) -> list[int]:
    said: list[int] = []
    async for response in engine.stub.Generate(request(adapter, tokens)):
        said += [token for delta in response.chunk.deltas for token in delta.token_ids]
    return said


async def load(engine: EngineServer, name: str, source: Path) -> int:
    answer = await engine.stub.LoadAdapter(
        engine_pb2.LoadAdapterRequest(adapter=name, source=str(source))
    )
    return answer.size_bytes


async def unload(engine: EngineServer, name: str) -> None:
    await engine.stub.UnloadAdapter(engine_pb2.UnloadAdapterRequest(adapter=name))


async def loaded(engine: EngineServer) -> list[str]:
    return [*(await engine.stub.GetModelInfo(engine_pb2.GetModelInfoRequest())).adapters]


async def failure(call: Any) -> ServiceError:
    with pytest.raises(grpc.RpcError) as raised:
        await call
    return ServiceError.from_rpc_error(raised.value, peer="engine")


async def test_each_request_goes_through_its_own_adapter(adapted: Adapted) -> None:
    async with engine_server(adapted.settings()) as engine:
        assert (await failure(generate(engine, "a"))).reason is Reason.ADAPTER_NOT_FOUND
        for name in ("a", "b", "c"):
            assert await load(engine, name, adapted.path / name) > 1000
        assert await loaded(engine) == ["a", "b", "c"]
        names = ["", "a", "b", "c", "b", "", "a"]
        # All begin alike: no adapter may find what another has computed.
        answers = await asyncio.gather(*(generate(engine, name) for name in names))
        for name, answer in zip(names, answers, strict=True):
            assert answer == adapted.expected(name or None)
        assert len({tuple(answer) for answer in answers}) == 4


async def test_one_is_loaded_and_unloaded_while_others_stream(adapted: Adapted) -> None:
    async with engine_server(adapted.settings()) as engine:
        await load(engine, "a", adapted.path / "a")
        through_a = asyncio.create_task(generate(engine, "a", 150))
        base = asyncio.create_task(generate(engine, "", 150))
        await until(lambda: engine.client.load.running_sequences == 2)
        await load(engine, "b", adapted.path / "b")
        assert await generate(engine, "b") == adapted.expected("b")
        unloading = asyncio.create_task(unload(engine, "a"))
        await asyncio.sleep(0.05)
        # It takes nothing new, and goes once who uses it has ended.
        assert not unloading.done() or through_a.done()
        assert (await failure(generate(engine, "a"))).reason is Reason.ADAPTER_NOT_FOUND
        await unloading
        assert through_a.done()
        assert await through_a == adapted.expected("a", 150)
        assert await base == adapted.expected(None, 150)
        assert await loaded(engine) == ["b"]


async def test_another_of_the_same_name_finds_nothing_of_the_first(adapted: Adapted) -> None:
    async with engine_server(adapted.settings()) as engine:
        for source in ("a", "b", "a"):
            await load(engine, "name", adapted.path / source)
            assert await generate(engine, "name") == adapted.expected(source)
            assert await generate(engine) == adapted.expected(None)
            await unload(engine, "name")


async def test_a_new_core_has_the_adapters_of_the_one_before(adapted: Adapted) -> None:
    own = adapted.settings(adapters={"c": str(adapted.path / "c")})
    async with engine_server(own) as engine:
        assert await loaded(engine) == ["c"]
        await load(engine, "a", adapted.path / "a")
        await unload(engine, "c")
        pid = engine.client.core_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not engine.client.is_ready)
        await until(lambda: engine.client.is_ready, within_s=60)
        assert await loaded(engine) == ["a"]
        assert await generate(engine, "a") == adapted.expected("a")


async def test_what_cannot_be_loaded_is_refused_with_the_reason(
    adapted: Adapted, tmp_path: Path
) -> None:
    async with engine_server(adapted.settings(max_adapters=1, max_adapter_rank=16)) as engine:
        error = await failure(load(engine, "x", tmp_path))
        assert error.reason is Reason.INVALID_FIELD
        assert error.field_violations[0][0] == "source"
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
        error = await failure(load(engine, "x", tmp_path))
        assert (error.reason, error.field_violations[0][0]) == (Reason.INVALID_FIELD, "source")
        assert "DoRA" in error.message
        error = await failure(load(engine, "c", adapted.path / "c"))
        assert error.reason is Reason.ADAPTER_LIMIT_REACHED
        assert error.metadata["setting"] == "engine.max_adapter_rank"
        await load(engine, "a", adapted.path / "a")
        assert await load(engine, "a", adapted.path / "a") > 0  # it is there
        error = await failure(load(engine, "a", adapted.path / "b"))
        assert error.reason is Reason.ADAPTER_NAME_TAKEN
        error = await failure(load(engine, "b", adapted.path / "b"))
        assert error.reason is Reason.ADAPTER_LIMIT_REACHED
        assert error.metadata["setting"] == "engine.max_adapters"
        assert (await failure(unload(engine, "b"))).reason is Reason.ADAPTER_NOT_FOUND
        assert await generate(engine, "a") == adapted.expected("a")
