"""Compiles what callers send in a process that may be lost: `python -m` this module.

Whoever sends a rule can make it costly, and a library that reads it can have faults. What takes too
long or too much memory, or crashes, does so here, where nobody computes.
"""

from __future__ import annotations

import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from services.engine.core.constraints.grammar import Tokens
from services.engine.core.constraints.sources import lark_source
from services.engine.core.constraints.vocabulary import Vocabulary
from services.engine.core.errors import InvalidConstraintError
from services.engine.core.framing import LENGTH
from services.engine.core.messages import Constraint


class Opening(msgspec.Struct, frozen=True):
    """The first message: for what tokens, and what a check may take."""

    vocabulary: Vocabulary
    max_cpu_s: int
    max_memory_bytes: int


class Verdict(msgspec.Struct, frozen=True):
    """The answer to a rule, and to the opening: the grammar, or why there is none."""

    lark: str = ""
    problem: str = ""


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer each message until there are no more."""
    opening = msgspec.msgpack.decode(_receive(source), type=Opening)
    tokens = Tokens(opening.vocabulary)
    _send(target, Verdict())
    with open("/proc/self/statm", encoding="ascii") as file:
        own_bytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = own_bytes + opening.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while payload := _receive(source):
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit_s = int(used.ru_utime + used.ru_stime) + 1 + opening.max_cpu_s
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        _send(target, check(tokens, msgspec.msgpack.decode(payload, type=Constraint)))


def check(tokens: Tokens, constraint: Constraint) -> Verdict:
    """Compile a rule and begin a completion under it."""
    try:
        lark = lark_source(constraint)
        tokens.compile(lark).try_out(may_be_empty=constraint.kind != "json_schema")
    except InvalidConstraintError as error:
        return Verdict(problem=str(error))
    except MemoryError:
        return Verdict(problem="it needs too much memory")
    return Verdict(lark=lark)


def _receive(source: BinaryIO) -> bytes:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _send(target: BinaryIO, verdict: Verdict) -> None:
    payload = msgspec.msgpack.encode(verdict)
    target.write(LENGTH.pack(len(payload)) + payload)
    target.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    serve(sys.stdin.buffer, sys.stdout.buffer)
