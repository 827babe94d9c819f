"""The life of a service process: settings, telemetry, gRPC server, health, drain, exit.

`services/<name>/__main__.py` calls `run` with what makes its Service; all services start, answer
and stop alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from meshserve.v1 import calls_pb2, calls_pb2_grpc, monitor_pb2_grpc
from services.runtime.call_host import CallHost
from services.runtime.connections import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS
from services.runtime.file_watch import FilesRefusedError
from services.runtime.health import HealthMonitor
from services.runtime.health_check import announce
from services.runtime.monitor import GRPC_SERVICE as MONITOR_SERVICE
from services.runtime.monitor import Metadata, Monitor, MonitorServicer
from services.runtime.own_endpoint import own_endpoint
from services.runtime.server_calls import CallInterceptor
from services.runtime.settings import ServerSettings, Settings, SettingsError, load_settings
from services.runtime.settings.addresses import split_address
from services.runtime.telemetry import Metrics, configure_logging, configure_tracing
from services.runtime.tls import ServerCertificates

log = logging.getLogger(__name__)

# sysexits.h: a supervisor must not restart what cannot start as it is configured.
EXIT_CONFIGURATION = 78
EXIT_DEFECT = 1
# How long servicers of calls that were cut off may take to release what they hold.
CLEAN_UP_TIMEOUT_S = 2.0
MAX_CONCURRENT_STREAMS = 4096
# See gc.set_threshold; the defaults took up to a tenth of a gateway's time.
COLLECTOR_THRESHOLDS = (20_000, 20, 20)


class StartupError(Exception):
    """The service cannot start. `hint` says the way out."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}\n  {hint}")
        self.message = message
        self.hint = hint


class Service(ABC):
    """What makes one service of the mesh. The constructor only stores; `start` works."""

    name: ClassVar[str]
    grpc_services: ClassVar[tuple[str, ...]]
    # Whether its unary methods can be called on a shared stream as well. They need no gRPC context,
    # and it is safe to call them twice.
    carries_calls: ClassVar[bool] = False
    # Knows the status of the process. Set before `register`.
    monitor: Monitor
    # What the process shows to callers; None without TLS. Set before `register`.
    certificates: ServerCertificates | None = None

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        # Set when the process shuts down: nothing new is taken from then on.
        self.draining = asyncio.Event()

    @abstractmethod
    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicers to the server."""

    async def start(self) -> None:  # noqa: B027 - most services need one, a simple one does not
        """Loads what the service needs before it answers. Raises StartupError."""

    def admit_watcher(self, metadata: Metadata) -> None:  # noqa: B027
        """Raises ServiceError when a caller may not see the status of the process."""

    async def probe(self) -> None:  # noqa: B027
        """Raises when the service cannot do its work now. Called every second."""

    async def drain(self) -> None:  # noqa: B027
        """Ends what would outlive its call. `draining` is set and health says NOT_SERVING."""

    async def stop(self) -> None:  # noqa: B027
        """Releases everything; no call is in flight any more."""


def run(make_service: Callable[[Settings, Metrics], Service], name: str) -> None:
    """Runs a service until SIGTERM or SIGINT and exits: 0 after a clean stop, 78 when it cannot
    start as it is configured, 1 after a defect."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    arguments = parser.parse_args()
    try:
        settings = load_settings(arguments.config)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_CONFIGURATION)
    configure_logging(name, settings.telemetry.log_level, settings.telemetry.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(make_service, name, settings))
    except StartupError as error:
        log.error("cannot start: %s", error.message, extra={"hint": error.hint})
        sys.stderr.write(f"meshserve {name}: {error}\n")
        sys.exit(EXIT_CONFIGURATION)
    except Exception:
        log.critical("ended by a defect", exc_info=True)
        sys.exit(EXIT_DEFECT)


async def _run(
    make_service: Callable[[Settings, Metrics], Service], name: str, settings: Settings
) -> None:
    stop_requested = _on_signals()
    tracing = configure_tracing(name, settings.telemetry)
    try:
        await _serve(make_service, name, settings, stop_requested)
    finally:
        await asyncio.to_thread(tracing.shutdown)
    log.info("stopped")


async def _serve(
    make_service: Callable[[Settings, Metrics], Service],
    name: str,
    settings: Settings,
    stop_requested: asyncio.Event,
) -> None:
    section = settings.server(name)
    metrics = Metrics(name)
    metrics.gauge("meshserve_build_info").labels(version("meshserve"), name).set(1)
    _serve_metrics(metrics, section, name)
    service = make_service(settings, metrics)
    calls = CallInterceptor(metrics)
    server = grpc.aio.server(interceptors=[calls], options=_server_options(section))
    service.certificates = _certificates(section, metrics)
    _bind(server, section, service.certificates, name)
    _announce(section, name)
    health = HealthMonitor(service.grpc_services, service.probe, metrics)
    service.monitor = Monitor(health, metrics, service.draining)
    carried = _register(service, server)
    monitor_pb2_grpc.add_MonitorServiceServicer_to_server(
        MonitorServicer(service.monitor, service.admit_watcher), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    names = (*service.grpc_services, *carried, MONITOR_SERVICE, health_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    try:
        if await _start(service, stop_requested):
            _spare_the_collector()
            await server.start()
            await health.start()
            if service.certificates is not None:
                service.certificates.start()
            log.info("serving", extra={"listen": section.listen})
            await stop_requested.wait()
            log.info("shutting down")
            await health.shut_down()
            service.draining.set()
            await _drain(service, server, section.drain_timeout_s)
    finally:
        service.draining.set()
        await server.stop(0)
        await calls.ended(CLEAN_UP_TIMEOUT_S)
        if service.certificates is not None:
            await service.certificates.stop()
        try:
            await service.stop()
        except Exception:
            # Must not take the place of what the start failed with, nor keep spans from leaving.
            log.exception("the service did not stop cleanly")


def _register(service: Service, server: grpc.aio.Server) -> tuple[str, ...]:
    """Adds the servicers; returns the names of gRPC services beside the service's own."""
    if not service.carries_calls:
        service.register(server)
        return ()
    host = CallHost(service.metrics, service.draining)
    service.register(host.beside(server))
    calls_pb2_grpc.add_CallServiceServicer_to_server(host, server)
    return (calls_pb2.DESCRIPTOR.services_by_name["CallService"].full_name,)


def _spare_the_collector() -> None:
    """What a service has loaded lives as long as it does: the collector need not look at it again.

    Nor need it look at each few hundred objects whether they have become garbage: requests make
    many, which nearly all go with their last reference.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


async def _start(service: Service, stop_requested: asyncio.Event) -> bool:
    """Whether the service has started; False when it is asked to stop before that."""
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(stop_requested.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        stopping.cancel()
        await starting
        return True
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    return False


async def _drain(service: Service, server: grpc.aio.Server, timeout_s: float) -> None:
    """Waits for the calls in flight, and cuts off those that take longer."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline):
            await service.drain()
    except Exception:
        log.exception("draining failed; calls in flight may be cut off")
    await server.stop(max(0.0, deadline - loop.time()))
    if loop.time() >= deadline:
        log.warning("calls in flight were cut off", extra={"after_s": timeout_s})


def _on_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; the same signal again ends the process at once."""
    requested = asyncio.Event()
    loop = asyncio.get_running_loop()

    def request(number: int) -> None:
        requested.set()
        loop.remove_signal_handler(number)
        # Not Python's handler, whose KeyboardInterrupt would end in a traceback.
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, request, number)
    return requested


def _server_options(section: ServerSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", section.max_message_bytes),
        ("grpc.max_send_message_length", section.max_message_bytes),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 4),
        ("grpc.http2.max_ping_strikes", 0),
        # Two servers on one port would share its calls silently; say that it is taken instead.
        ("grpc.so_reuseport", 0),
    ]


def _bind(
    server: grpc.aio.Server,
    section: ServerSettings,
    certificates: ServerCertificates | None,
    name: str,
) -> None:
    try:
        if certificates is None:
            server.add_insecure_port(section.listen)
        else:
            server.add_secure_port(section.listen, certificates.for_grpc())
    except RuntimeError as error:
        raise StartupError(
            f"the address {section.listen} cannot be listened on; is it in use?",
            f"stop what uses it, or set {name}.listen to another address",
        ) from error


def _announce(section: ServerSettings, name: str) -> None:
    try:
        announce(name, own_endpoint(section))
    except OSError as error:
        log.warning("probes read the settings each time", extra={"reason": str(error)})


def _certificates(section: ServerSettings, metrics: Metrics) -> ServerCertificates | None:
    if section.tls is None:
        return None
    try:
        return ServerCertificates(section.tls, metrics)
    except FilesRefusedError as error:
        raise StartupError(
            f"a TLS file cannot be used: {error}", "check the tls section"
        ) from error


def _serve_metrics(metrics: Metrics, section: ServerSettings, name: str) -> None:
    if section.metrics_listen is None:
        return
    host, port = split_address(section.metrics_listen)
    try:
        metrics.serve(host, port)
    except OSError as error:
        raise StartupError(
            f"the metrics address {section.metrics_listen} cannot be listened on: "
            f"{error.strerror or error}",
            f"stop what uses it, or set {name}.metrics_listen to another address or to null",
        ) from error
