"""Step times of checkpoints in several formats, in turns.

    python -m benchmarks.formats int4=/models/plain:int4 gptq=/models/gptq awq=/models/awq

Each argument is NAME=PATH, with `:WEIGHTS` as `models.*.weights` has them (default: auto).
"""

from __future__ import annotations

import argparse
import itertools

import torch

from benchmarks.floors import STEPS, Served
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.team import Team


def main() -> None:
    """Print a line for each checkpoint and step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=PATH[:WEIGHTS]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=20, help="of a step, in each round")
    options = parser.parse_args()
    library = cpu.activate("auto")
    if library is None:
        parser.error("the native kernels are not available here")
    team = Team(library, options.threads)
    served: dict[str, Served] = {}
    for argument in options.checkpoints:
        name, _, place = argument.partition("=")
        path, _, weights = place.partition(":")
        served[name] = Served(path, team, weights or "auto")
    for _, each in itertools.product(range(options.rounds), served.values()):
        each.measure(options.repeats)
    print(f"{options.threads} threads, {library.isa}; ms a step, the best round's median\n")
    steps = [f"{sequences} x {tokens} of {context}" for sequences, tokens, context in STEPS]
    print(f"| | weights | {' | '.join(steps)} |")
    print(f"| --- | --- |{' ---: |' * len(steps)}")
    for name, each in served.items():
        kept = ", ".join(f"{kind} {size / 2**20:.0f} MiB" for kind, size in each.kept.items())
        times = [f"{min(each.rounds_ms[step]):.2f}" for step in STEPS]
        print(f"| {name} | {kept} | {' | '.join(times)} |")


if __name__ == "__main__":
    main()
