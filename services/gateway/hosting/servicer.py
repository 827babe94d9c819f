"""AdminService over gRPC: for operators alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshserve.v1 import admin_pb2, admin_pb2_grpc
from services.gateway.hosting.hosting import Hosting
from services.gateway.hosting.names import Names
from services.gateway.hosting.operations import Operations, Outcome
from services.gateway.hosting.watch import UNKNOWN, Report, is_there
from services.gateway.stages.authenticate import Authenticator
from services.runtime.errors import ServiceError, invalid_field
from services.runtime.replicas import Replica
from services.runtime.settings import Settings

_INTENTS = {
    None: admin_pb2.MODEL_INTENT_UNSPECIFIED,
    True: admin_pb2.MODEL_INTENT_LOADED,
    False: admin_pb2.MODEL_INTENT_UNLOADED,
}
_NO_FAILURES: Mapping[Replica, ServiceError] = {}


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Checks who asks and for what, and tells how it went."""

    def __init__(
        self,
        settings: Settings,
        hosting: Hosting,
        names: Names,
        operations: Operations,
        authenticator: Authenticator,
    ) -> None:
        self._settings = settings
        self._hosting = hosting
        self._names = names
        self._operations = operations
        self._authenticator = authenticator

    async def ListModels(  # noqa: N802
        self, request: admin_pb2.AdminServiceListModelsRequest, context: Any
    ) -> admin_pb2.AdminServiceListModelsResponse:
        """Every model, as all engines say now."""
        self._check_operator(context)
        await self._hosting.refresh()
        return admin_pb2.AdminServiceListModelsResponse(
            models=[self._model(name) for name in sorted(self._settings.models)]
        )

    async def LoadModel(  # noqa: N802
        self, request: admin_pb2.AdminServiceLoadModelRequest, context: Any
    ) -> admin_pb2.AdminServiceLoadModelResponse:
        """Loads a model everywhere."""
        model = self._asked(request, context)
        outcome = await self._operations.load_model(model)
        return admin_pb2.AdminServiceLoadModelResponse(model=self._model(model, outcome.failures))

    async def UnloadModel(  # noqa: N802
        self, request: admin_pb2.AdminServiceUnloadModelRequest, context: Any
    ) -> admin_pb2.AdminServiceUnloadModelResponse:
        """Unloads a model everywhere."""
        model = self._asked(request, context)
        timeout_ms = request.timeout_ms if request.HasField("timeout_ms") else None
        outcome = await self._operations.unload_model(model, timeout_ms)
        return admin_pb2.AdminServiceUnloadModelResponse(
            model=self._model(model, outcome.failures),
            aborted_requests=sum(each.aborted_requests for each in outcome.answers.values()),
        )

    async def SleepModel(  # noqa: N802
        self, request: admin_pb2.AdminServiceSleepModelRequest, context: Any
    ) -> admin_pb2.AdminServiceSleepModelResponse:
        """Puts a model to sleep everywhere."""
        model = self._asked(request, context)
        outcome = await self._operations.sleep_model(model)
        return admin_pb2.AdminServiceSleepModelResponse(
            model=self._model(model, outcome.failures),
            freed_bytes=sum(each.freed_bytes for each in outcome.answers.values()),
        )

    async def WakeModel(  # noqa: N802
        self, request: admin_pb2.AdminServiceWakeModelRequest, context: Any
    ) -> admin_pb2.AdminServiceWakeModelResponse:
        """Wakes a model everywhere."""
        model = self._asked(request, context)
        outcome = await self._operations.wake_model(model)
        return admin_pb2.AdminServiceWakeModelResponse(model=self._model(model, outcome.failures))

    async def ListAdapters(  # noqa: N802
        self, request: admin_pb2.AdminServiceListAdaptersRequest, context: Any
    ) -> admin_pb2.AdminServiceListAdaptersResponse:
        """Adapters of a model, or of all."""
        self._check_operator(context)
        models = [self._names.find(request.model).model] if request.model else None
        await self._hosting.refresh()
        return admin_pb2.AdminServiceListAdaptersResponse(
            adapters=[
                self._adapter(model, adapter)
                for model in models or sorted(self._settings.models)
                for adapter in self._hosting.adapters_of(model)
            ]
        )

    async def LoadAdapter(  # noqa: N802
        self, request: admin_pb2.AdminServiceLoadAdapterRequest, context: Any
    ) -> admin_pb2.AdminServiceLoadAdapterResponse:
        """Loads an adapter everywhere."""
        self._check_operator(context)
        model = self._names.find(request.model).model
        outcome = await self._operations.load_adapter(model, request.adapter, request.source)
        return admin_pb2.AdminServiceLoadAdapterResponse(
            adapter=self._adapter(model, request.adapter, outcome)
        )

    async def UnloadAdapter(  # noqa: N802
        self, request: admin_pb2.AdminServiceUnloadAdapterRequest, context: Any
    ) -> admin_pb2.AdminServiceUnloadAdapterResponse:
        """Unloads an adapter everywhere."""
        self._check_operator(context)
        if not request.adapter:
            raise invalid_field("adapter", "is needed")
        model = self._names.find(request.model).model if request.model else ""
        outcome = await self._operations.unload_adapter(model, request.adapter)
        replicas = [
            admin_pb2.AdapterReplica(address=replica.address) for replica in outcome.answers
        ] + [
            admin_pb2.AdapterReplica(
                address=replica.address, loaded=True, problem=error.message, reason=error.reason
            )
            for replica, error in outcome.failures.items()
        ]
        return admin_pb2.AdminServiceUnloadAdapterResponse(
            replicas=sorted(replicas, key=lambda each: each.address)
        )

    def _check_operator(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        self._authenticator.operator(metadata.get("authorization"))

    def _asked(self, request: Any, context: Any) -> str:
        """The model that a request of an operator names."""
        self._check_operator(context)
        if not request.model:
            raise invalid_field("model", "is needed")
        named = self._names.find(request.model)
        if named.adapter:
            raise invalid_field("model", f"{request.model!r} is an adapter")
        return named.model

    def _model(
        self, name: str, failures: Mapping[Replica, ServiceError] = _NO_FAILURES
    ) -> admin_pb2.HostedModel:
        reports = _by_address(self._hosting.watch(name).reports)
        return admin_pb2.HostedModel(
            model=name,
            state=self._hosting.state(name),
            intent=_INTENTS[self._hosting.store.current.models.get(name)],
            replicas=[
                _model_replica(name, replica, report, failures.get(replica))
                for replica, report in reports
            ],
            adapters=[self._adapter(name, each) for each in self._hosting.adapters_of(name)],
        )

    def _adapter(
        self, model: str, name: str, outcome: Outcome | None = None
    ) -> admin_pb2.HostedAdapter:
        watch = self._hosting.watch(model)
        known = self._hosting.adapters[name]
        answers, failures = (outcome.answers, outcome.failures) if outcome else ({}, _NO_FAILURES)
        adapter = admin_pb2.HostedAdapter(adapter=name, model=model)
        desired = self._hosting.store.current.adapters.get(name)
        if desired is not None:
            adapter.source, adapter.revision = desired.source, desired.revision
            adapter.load_time.FromMilliseconds(desired.load_time_unix_ms)
        for replica, report in _by_address(watch.reports):
            error = failures.get(replica)
            adapter.replicas.add(
                address=replica.address,
                loaded=known.engine_name in watch.adapters_at(replica, model),
                problem=error.message if error else report.problem,
                reason=error.reason if error else "",
                size_bytes=answers[replica].size_bytes if replica in answers else 0,
            )
        return adapter


def _by_address(reports: Mapping[Replica, Report]) -> list[tuple[Replica, Report]]:
    return sorted(reports.items(), key=lambda each: each[0].address)


def _model_replica(
    name: str, replica: Replica, report: Report, error: ServiceError | None
) -> admin_pb2.ModelReplica:
    told = report.models.get(name) if report.models else None
    shown = admin_pb2.ModelReplica(
        address=replica.address,
        state=UNKNOWN,
        problem=error.message if error else report.problem,
        reason=error.reason if error else "",
    )
    if told is not None:
        # An engine that only took too long to answer is still where it was.
        if is_there(replica):
            shown.state = told.state
        shown.problem = shown.problem or told.problem
        shown.memory_bytes, shown.requests = told.memory_bytes, told.requests
        shown.adapters.extend(sorted({each.partition("@")[0] for each in told.adapters}))
    return shown
