"""What tracing costs: meshes that record no, a tenth and all traces, one workload, in turns.

    python -m benchmarks.tracing_cost --workload W3 --turns 9

All meshes are alive throughout and take turns in changing order, so that the machine's drift falls
on all of them; each figure is the median of the ratios turn by turn. The spans go to a receiver
that throws them away, a process of its own on the same machine, whose time is counted apart: where
a real collector runs is a matter of the deployment.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import grpc
import psutil

from benchmarks.local_mesh import LocalMesh
from benchmarks.plan import make_plan
from benchmarks.systems.meshserve_systems import KV_CACHE_BYTES, MAX_SEQUENCES, RunningMesh
from benchmarks.workloads import SHAPES, Workload
from services.runtime.modelfiles import pull

OFF = "off"
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


@dataclass(slots=True)
class Turns:
    """What one mesh did, turn by turn."""

    output_tokens_per_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)  # median of the turn's requests
    cpu_s: list[float] = field(default_factory=list)  # of all its processes

    def ratios(self, other: Turns) -> list[float]:
        """Throughput of this one to that of another in the same turn."""
        return [
            own / its
            for own, its in zip(self.output_tokens_per_s, other.output_tokens_per_s, strict=True)
        ]


def _receive(address: Connection) -> None:
    """Takes spans and forgets them; answers with an empty message, which means full success."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: b""
    )
    service, _, method = EXPORT[1:].partition("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    address.send(f"http://127.0.0.1:{port}")
    server.wait_for_termination()


@contextmanager
def receiver() -> Iterator[tuple[str, psutil.Process]]:
    """An OTLP receiver in a process of its own: its endpoint, and the process."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_receive, args=(its,), daemon=True)
    process.start()
    try:
        yield ours.recv(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join()


def settings_of(model: str, sample_ratio: float, endpoint: str) -> dict[str, dict[str, object]]:
    """A mesh that records this share of its traces; 0 exports none and makes no span."""
    telemetry = {"otlp_endpoint": endpoint, "sample_ratio": sample_ratio} if sample_ratio else {}
    return {
        "models": {"bench": {"source": model}},
        "engine": {"max_running_sequences": MAX_SEQUENCES, "kv_cache_bytes": KV_CACHE_BYTES},
        "telemetry": telemetry,
    }


def take_turns(meshes: dict[str, LocalMesh], workloads: Sequence[Workload]) -> dict[str, Turns]:
    """Each workload by all meshes; who goes first changes from turn to turn."""
    turns = {name: Turns() for name in meshes}
    names = list(meshes)
    for turn, workload in enumerate(workloads):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            mesh = meshes[name]
            before_s = _cpu_s(mesh.processes())
            run = RunningMesh(mesh).run(workload)
            own = turns[name]
            own.cpu_s.append(_cpu_s(mesh.processes()) - before_s)
            own.output_tokens_per_s.append(run.output_tokens_per_s)
            own.first_token_s.append(statistics.median(trace.first_token_s for trace in run.traces))
    return turns


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tracing_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--workload", default="W3", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    pull(arguments.model)
    shape = next(shape for shape in SHAPES if shape.name == arguments.workload)
    plan = make_plan(arguments.model, [shape], arguments.turns, arguments.seed)
    with receiver() as (endpoint, receiving), ExitStack() as stack:
        meshes = {
            OFF if not ratio else f"{100 * ratio:g} %": stack.enter_context(
                LocalMesh(settings_of(arguments.model, ratio, endpoint))
            )
            for ratio in (0.0, *arguments.ratios)
        }
        warm_up = plan.warm_ups[0]
        for mesh in meshes.values():
            RunningMesh(mesh).run(Workload("warm-up", len(warm_up), tuple(warm_up)))
        before_s = _cpu_s([receiving])
        turns = take_turns(meshes, [workloads[0] for workloads in plan.rounds])
        received_s = _cpu_s([receiving]) - before_s
    requests = len(plan.rounds[0][0].requests)
    print(f"{arguments.workload}, {arguments.turns} turns of {requests} requests")
    print("traces   tokens/s   of off (range)           TTFT p50 ms   CPU ms a request")
    for name, own in turns.items():
        ratios = own.ratios(turns[OFF])
        print(
            f"{name:<7}"
            f"{statistics.median(own.output_tokens_per_s):10.1f}"
            f"{statistics.median(ratios):9.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            f"{1000 * statistics.median(own.first_token_s):14.1f}"
            f"{1000 * statistics.median(own.cpu_s) / requests:19.2f}"
        )
    total = requests * arguments.turns * sum(arguments.ratios)
    print(f"receiver: {1000 * received_s / total:.2f} ms of CPU a traced request")
    return 0


if __name__ == "__main__":
    sys.exit(main())
