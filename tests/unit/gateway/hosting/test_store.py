"""What is desired is common to all gateways, outlives them, and outlives the server's memory."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest

from services.gateway.hosting.desired import Adapter, DamagedDocumentError, Desired
from services.gateway.hosting.store import DOCUMENT_KEY, DesiredStore
from services.runtime.errors import Reason, ServiceError
from services.runtime.valkey import EmbeddedValkey, ValkeyClient, ValkeyError, connect
from tests.support.ports import free_ports
from tests.support.waiting import until


@pytest.fixture(scope="module")
def valkey_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    (port,) = free_ports(1)
    command = EmbeddedValkey(tmp_path_factory.mktemp("valkey"), port=port).command()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
async def client(valkey_port: int) -> AsyncIterator[ValkeyClient]:
    async with connect(f"redis://127.0.0.1:{valkey_port}/0") as connected:
        async with asyncio.timeout(30):
            while True:
                with suppress(ValkeyError):
                    await connected.execute("FLUSHALL")
                    break
                await asyncio.sleep(0.05)
        yield connected


def adapter(name: str, model: str = "m") -> Adapter:
    return Adapter.new(model, name, "/source")


async def test_gateways_agree_whoever_changes_what(client: ValkeyClient) -> None:
    stores = [DesiredStore(client, shared=True) for _ in range(3)]
    await asyncio.gather(
        *(
            store.change(
                lambda desired, name=f"{gateway}-{number}": desired.with_adapter(adapter(name))
            )
            for gateway, store in enumerate(stores)
            for number in range(5)
        )
    )
    for store in stores:
        await store.refresh()
        assert len(store.current.adapters) == store.current.version == 15
    assert stores[0].current == stores[1].current == stores[2].current
    later = DesiredStore(client, shared=True)
    await later.refresh()
    assert later.current == stores[0].current


async def test_a_server_that_has_forgotten_is_told_again(client: ValkeyClient) -> None:
    old, new = DesiredStore(client, shared=True), DesiredStore(client, shared=True)
    await old.change(lambda desired: desired.with_model("m", loaded=True))
    await new.refresh()
    await new.change(lambda desired: desired.with_model("m", loaded=False))
    await client.execute("FLUSHALL")
    for store in (old, new, old):
        await store.refresh()
    assert old.current == new.current == Desired(2, {"m": False})


async def test_one_at_a_time_acts_on_a_model(client: ValkeyClient) -> None:
    first, second = DesiredStore(client, shared=True), DesiredStore(client, shared=True)
    async with first.lease("m") as ours:
        assert ours
        for store in (first, second):
            async with store.lease("m", wait=False) as theirs:
                assert not theirs
        async with second.lease("another", wait=False) as other:
            assert other

        async def wait() -> None:
            async with second.lease("m"):
                pass

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.3)
        assert not waiting.done()
    await waiting


async def test_without_a_server_one_gateway_goes_on_and_several_do_not() -> None:
    (port,) = free_ports(1)
    async with connect(f"redis://127.0.0.1:{port}/0") as absent:
        alone = DesiredStore(absent, shared=False)
        async with alone.lease("m") as ours:
            assert ours
            await alone.change(lambda desired: desired.with_model("m", loaded=False))
        await alone.refresh()
        assert alone.current.models == {"m": False}
        one_of_several = DesiredStore(absent, shared=True)
        with pytest.raises(ServiceError) as error:
            await one_of_several.change(lambda desired: desired.with_model("m", loaded=False))
        assert error.value.reason is Reason.HOSTING_UNAVAILABLE
        with pytest.raises(ServiceError):
            async with one_of_several.lease("m"):
                pass
        await one_of_several.refresh()
        assert one_of_several.current == Desired()


async def test_what_the_server_has_after_an_outage_is_what_was_changed_meanwhile(
    client: ValkeyClient, valkey_port: int
) -> None:
    (port,) = free_ports(1)
    async with connect(f"redis://127.0.0.1:{port}/0") as away:
        store = DesiredStore(away, shared=False)
        await store.change(lambda desired: desired.with_adapter(adapter("x")))
        await away.use(f"redis://127.0.0.1:{valkey_port}/0")

        async def told() -> bool:
            await store.refresh()
            return bool(await client.execute("HGET", DOCUMENT_KEY, "document"))

        async with asyncio.timeout(20):
            while not await told():
                await asyncio.sleep(0.05)
        await until(lambda: "x" in store.current.adapters)


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"version": 1, "models": 3}'])
async def test_a_damaged_document_is_passed_over(client: ValkeyClient, document: bytes) -> None:
    with pytest.raises(DamagedDocumentError):
        Desired.from_json(document)
    await client.execute("HSET", DOCUMENT_KEY, "version", 1, "document", document)
    store = DesiredStore(client, shared=True)
    await store.refresh()
    assert store.current == Desired()


def test_a_document_is_read_as_it_was_written() -> None:
    desired = Desired().with_adapter(adapter("x")).with_model("m", loaded=True)
    assert Desired.from_json(desired.to_json()) == desired


def test_what_is_loaded_anew_has_another_name_to_engines() -> None:
    assert adapter("x").engine_name != adapter("x").engine_name
