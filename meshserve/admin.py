"""What operators ask of a mesh: `Client.admin` and `AsyncClient.admin`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from meshserve.hosting import AdapterReplica, HostedAdapter, HostedModel
from meshserve.transport import USE_CLIENT_DEFAULT, Timeout
from meshserve.v1 import admin_pb2
from meshserve.wire.assign import checked_text
from meshserve.wire.hosting import adapter_replica, hosted_adapter, hosted_model


class Admin:
    """For keys of operators.

    Each method acts on all engines of the model, and tells engine by engine how that went; it
    raises a MeshServeError where no engine could do it, or the key is not an operator's. `timeout`
    is in seconds, for engines that read their weights from slow disks.
    """

    def __init__(self, call: Callable[[str, Any, Timeout], Any]) -> None:
        self._call = call

    def models(self, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> list[HostedModel]:
        """Every model of the settings, by name."""
        request = admin_pb2.AdminServiceListModelsRequest()
        answer = self._call("ListModels", request, timeout)
        return [hosted_model(each) for each in answer.models]

    def load_model(self, model: str, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> HostedModel:
        """Loads a model that the settings name; engines that start later do so too."""
        request = admin_pb2.AdminServiceLoadModelRequest(model=checked_text(model, "model"))
        return hosted_model((self._call("LoadModel", request, timeout)).model)

    def unload_model(
        self,
        model: str,
        *,
        drain_timeout_ms: int | None = None,
        timeout: Timeout = USE_CLIENT_DEFAULT,
    ) -> HostedModel:
        """Unloads a model: requests for it are refused from now on, and those in flight may end
        within `drain_timeout_ms` (30 s by default)."""
        request = admin_pb2.AdminServiceUnloadModelRequest(
            model=checked_text(model, "model"), timeout_ms=drain_timeout_ms
        )
        return hosted_model((self._call("UnloadModel", request, timeout)).model)

    def sleep_model(self, model: str, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> HostedModel:
        """Frees the memory of an idle model until a request for it comes."""
        request = admin_pb2.AdminServiceSleepModelRequest(model=checked_text(model, "model"))
        return hosted_model((self._call("SleepModel", request, timeout)).model)

    def wake_model(self, model: str, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> HostedModel:
        """Brings a sleeping model back before a request does."""
        request = admin_pb2.AdminServiceWakeModelRequest(model=checked_text(model, "model"))
        return hosted_model((self._call("WakeModel", request, timeout)).model)

    def adapters(
        self, model: str = "", *, timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> list[HostedAdapter]:
        """The adapters of a model, or of all."""
        request = admin_pb2.AdminServiceListAdaptersRequest(model=checked_text(model, "model"))
        answer = self._call("ListAdapters", request, timeout)
        return [hosted_adapter(each) for each in answer.adapters]

    def load_adapter(
        self, name: str, source: str, *, model: str = "", timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> HostedAdapter:
        """Loads an adapter from where the engines find it, in the place of what has its name."""
        request = admin_pb2.AdminServiceLoadAdapterRequest(
            adapter=checked_text(name, "adapter"),
            source=checked_text(source, "source"),
            model=checked_text(model, "model"),
        )
        return hosted_adapter((self._call("LoadAdapter", request, timeout)).adapter)

    def unload_adapter(
        self, name: str, *, model: str = "", timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> list[AdapterReplica]:
        """Unloads an adapter; requests that use it may end."""
        request = admin_pb2.AdminServiceUnloadAdapterRequest(
            adapter=checked_text(name, "adapter"), model=checked_text(model, "model")
        )
        answer = self._call("UnloadAdapter", request, timeout)
        return [adapter_replica(each) for each in answer.replicas]


class AsyncAdmin:
    """For keys of operators, from asyncio.

    Each method acts on all engines of the model, and tells engine by engine how that went; it
    raises a MeshServeError where no engine could do it, or the key is not an operator's. `timeout`
    is in seconds, for engines that read their weights from slow disks.
    """

    def __init__(self, call: Callable[[str, Any, Timeout], Awaitable[Any]]) -> None:
        self._call = call

    async def models(self, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> list[HostedModel]:
        """Every model of the settings, by name."""
        request = admin_pb2.AdminServiceListModelsRequest()
        answer = await self._call("ListModels", request, timeout)
        return [hosted_model(each) for each in answer.models]

    async def load_model(self, model: str, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> HostedModel:
        """Loads a model that the settings name; engines that start later do so too."""
        request = admin_pb2.AdminServiceLoadModelRequest(model=checked_text(model, "model"))
        return hosted_model((await self._call("LoadModel", request, timeout)).model)

    async def unload_model(
        self,
        model: str,
        *,
        drain_timeout_ms: int | None = None,
        timeout: Timeout = USE_CLIENT_DEFAULT,
    ) -> HostedModel:
        """Unloads a model: requests for it are refused from now on, and those in flight may end
        within `drain_timeout_ms` (30 s by default)."""
        request = admin_pb2.AdminServiceUnloadModelRequest(
            model=checked_text(model, "model"), timeout_ms=drain_timeout_ms
        )
        return hosted_model((await self._call("UnloadModel", request, timeout)).model)

    async def sleep_model(
        self, model: str, *, timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> HostedModel:
        """Frees the memory of an idle model until a request for it comes."""
        request = admin_pb2.AdminServiceSleepModelRequest(model=checked_text(model, "model"))
        return hosted_model((await self._call("SleepModel", request, timeout)).model)

    async def wake_model(self, model: str, *, timeout: Timeout = USE_CLIENT_DEFAULT) -> HostedModel:
        """Brings a sleeping model back before a request does."""
        request = admin_pb2.AdminServiceWakeModelRequest(model=checked_text(model, "model"))
        return hosted_model((await self._call("WakeModel", request, timeout)).model)

    async def adapters(
        self, model: str = "", *, timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> list[HostedAdapter]:
        """The adapters of a model, or of all."""
        request = admin_pb2.AdminServiceListAdaptersRequest(model=checked_text(model, "model"))
        answer = await self._call("ListAdapters", request, timeout)
        return [hosted_adapter(each) for each in answer.adapters]

    async def load_adapter(
        self, name: str, source: str, *, model: str = "", timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> HostedAdapter:
        """Loads an adapter from where the engines find it, in the place of what has its name."""
        request = admin_pb2.AdminServiceLoadAdapterRequest(
            adapter=checked_text(name, "adapter"),
            source=checked_text(source, "source"),
            model=checked_text(model, "model"),
        )
        return hosted_adapter((await self._call("LoadAdapter", request, timeout)).adapter)

    async def unload_adapter(
        self, name: str, *, model: str = "", timeout: Timeout = USE_CLIENT_DEFAULT
    ) -> list[AdapterReplica]:
        """Unloads an adapter; requests that use it may end."""
        request = admin_pb2.AdminServiceUnloadAdapterRequest(
            adapter=checked_text(name, "adapter"), model=checked_text(model, "model")
        )
        answer = await self._call("UnloadAdapter", request, timeout)
        return [adapter_replica(each) for each in answer.replicas]
