"""Why an engine does not answer, in the contract's terms."""

from __future__ import annotations

import logging

from services.engine.adapters import AdapterError
from services.engine.core.errors import (
    AdapterExistsError,
    AdapterLimitError,
    AdapterNotFoundError,
    DrainingError,
    QueueFullError,
)
from services.engine.request_stream import CoreLostError, RefusedError
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.modelfiles import ModelFileError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


def as_service_error(error: CoreLostError | RefusedError) -> ServiceError:
    """Why the core did not answer."""
    if isinstance(error, CoreLostError):
        return ServiceError(Reason.ENGINE_RESTARTED, str(error), retry_after_s=RETRY_AFTER_S)
    if error.kind == QueueFullError.__name__:
        return ServiceError(Reason.QUEUE_FULL, str(error), retry_after_s=RETRY_AFTER_S)
    if error.kind == DrainingError.__name__:
        return draining_error()
    if error.kind == AdapterNotFoundError.__name__:
        return adapter_not_found_error(str(error))
    # What else the core refuses has been checked before it was asked.
    log.error("the engine core refused a valid request: %s: %s", error.kind, error)
    return ServiceError(Reason.INTERNAL, "internal error; the server's log has the rest")


def adapter_not_found_error(description: str) -> ServiceError:
    """The model has no such adapter, or it takes nothing new."""
    return ServiceError(
        Reason.ADAPTER_NOT_FOUND, description, field_violations=[("adapter", description)]
    )


def adapter_error(error: AdapterError) -> ServiceError:
    """Why the core did not load or unload an adapter."""
    match error.kind:
        case AdapterNotFoundError.__name__:
            return adapter_not_found_error(str(error))
        case AdapterExistsError.__name__:
            return ServiceError(
                Reason.ADAPTER_NAME_TAKEN, str(error), field_violations=[("adapter", str(error))]
            )
        case AdapterLimitError.__name__:
            field = "adapter" if error.setting == "max_adapters" else "source"
            return ServiceError(
                Reason.ADAPTER_LIMIT_REACHED,
                str(error),
                field_violations=[(field, str(error))],
                metadata={"setting": f"engine.{error.setting}"} if error.setting else {},
            )
        case ModelFileError.__name__:
            return invalid_field("source", str(error))
    return ServiceError(Reason.INTERNAL, "internal error; the server's log has the rest")


def draining_error() -> ServiceError:
    """The engine, or this model of it, takes nothing new."""
    return ServiceError(
        Reason.DRAINING, "this engine takes nothing new", retry_after_s=RETRY_AFTER_S
    )


def unavailable_error(description: str) -> ServiceError:
    """The engine can take nothing for now."""
    return ServiceError(
        Reason.SERVICE_UNAVAILABLE,
        description,
        retry_after_s=RETRY_AFTER_S,
        metadata={"service": "engine"},
    )


def not_loaded_error(model: str, state: str) -> ServiceError:
    """The model is not in memory, and requests do not bring it there."""
    return ServiceError(
        Reason.MODEL_NOT_LOADED,
        f"the model {model!r} is {state}",
        metadata={"model": model, "state": state},
    )


def loading_error(model: str) -> ServiceError:
    """The model is on its way into memory."""
    return ServiceError(
        Reason.MODEL_LOADING,
        f"the model {model!r} is being loaded",
        retry_after_s=RETRY_AFTER_S,
        metadata={"model": model, "state": "loading"},
    )
