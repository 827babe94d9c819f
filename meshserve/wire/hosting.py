"""Turns messages of AdminService into the typed results of meshserve.hosting."""

from __future__ import annotations

from meshserve.hosting import AdapterReplica, HostedAdapter, HostedModel, ModelReplica
from meshserve.v1 import admin_pb2
from meshserve.wire.responses import model_state, timestamp

_INTENTS = {
    admin_pb2.MODEL_INTENT_LOADED: "loaded",
    admin_pb2.MODEL_INTENT_UNLOADED: "unloaded",
}


def hosted_model(source: admin_pb2.HostedModel) -> HostedModel:
    """A model, and what each engine does with it."""
    return HostedModel(
        name=source.model,
        state=model_state(source.state),
        intent=_INTENTS.get(source.intent, ""),
        replicas=tuple(
            ModelReplica(
                address=each.address,
                state=model_state(each.state),
                problem=each.problem,
                reason=each.reason,
                memory_bytes=each.memory_bytes,
                requests=each.requests,
                adapters=tuple(each.adapters),
            )
            for each in source.replicas
        ),
        adapters=tuple(hosted_adapter(each) for each in source.adapters),
    )


def hosted_adapter(source: admin_pb2.HostedAdapter) -> HostedAdapter:
    """An adapter, and which engines have it."""
    return HostedAdapter(
        name=source.adapter,
        model=source.model,
        source=source.source,
        revision=source.revision,
        load_time=timestamp(source.load_time) if source.HasField("load_time") else None,
        replicas=tuple(adapter_replica(each) for each in source.replicas),
    )


def adapter_replica(source: admin_pb2.AdapterReplica) -> AdapterReplica:
    """An adapter on one engine."""
    return AdapterReplica(
        address=source.address,
        loaded=source.loaded,
        problem=source.problem,
        reason=source.reason,
        size_bytes=source.size_bytes,
    )
