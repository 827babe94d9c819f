"""Compiles rules on a thread beside the steps, and keeps what it has compiled."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.engine.core.constraints.checking import CheckProcess
from services.engine.core.constraints.grammar import Grammar, Tokens
from services.engine.core.constraints.vocabulary import Vocabulary
from services.engine.core.errors import ConstraintsUnavailableError, EngineError
from services.engine.core.messages import Constraint

logger = logging.getLogger(__name__)

# Rules kept compiled, and how many bytes their texts have together: the grammar of a long one takes
# some hundred times as much memory.
_MAX_KEPT = 256
_MAX_KEPT_BYTES = 1 << 20


class Compilation:
    """A rule on its way to a grammar. Once `done`, it has either a `grammar` or an `error`."""

    __slots__ = ("constraint", "done", "error", "grammar")

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.grammar: Grammar | None = None
        self.error: EngineError | None = None
        self.done = False  # written last


@dataclass(slots=True)
class CompilerCounts:
    """What a compiler has done since it was made."""

    compiled: int = 0  # rules, faulty ones included
    found: int = 0  # rules that were compiled, or being compiled, when they were asked for
    compile_us: int = 0  # spent on those that were not


class Compiler:
    """Compiles each rule once, in the order they are asked for, on a thread that ends with it.

    Nothing is loaded or started before the first is: who sends no rules pays nothing.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary]) -> None:
        self.counts = CompilerCounts()
        self._read_vocabulary = read_vocabulary
        self._kept: OrderedDict[Constraint, Compilation] = OrderedDict()
        self._kept_bytes = 0
        self._work: queue.SimpleQueue[Compilation | None] | None = None

    def compile(self, constraint: Constraint) -> Compilation:
        """Have a rule compiled; the same compilation for the same rule."""
        compilation = self._kept.get(constraint)
        if compilation is not None:
            # What is not the rule's fault may be over by now.
            if not isinstance(compilation.error, ConstraintsUnavailableError):
                self.counts.found += 1
                self._kept.move_to_end(constraint)
                return compilation
            self._drop(constraint)
        compilation = self._kept[constraint] = Compilation(constraint)
        self._kept_bytes += len(constraint.text)
        while len(self._kept) > 1 and (
            len(self._kept) > _MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES
        ):
            self._drop(next(iter(self._kept)))
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(
                target=_work_off,
                args=(self._work, self._read_vocabulary, self.counts),
                name="constraints",
                daemon=True,
            ).start()
        self._work.put(compilation)
        return compilation

    def _drop(self, constraint: Constraint) -> None:
        del self._kept[constraint]
        self._kept_bytes -= len(constraint.text)

    def __del__(self) -> None:
        if self._work is not None:
            self._work.put(None)


def _work_off(
    work: queue.SimpleQueue[Compilation | None],
    read_vocabulary: Callable[[], Vocabulary],
    counts: CompilerCounts,
) -> None:
    tokens: Tokens | None = None
    checker: CheckProcess | None = None
    while (compilation := work.get()) is not None:
        started_ns = time.monotonic_ns()
        try:
            if tokens is None or checker is None:
                vocabulary = read_vocabulary()
                checker = CheckProcess(vocabulary)
                tokens = Tokens(vocabulary)
            compilation.grammar = tokens.compile(checker.check(compilation.constraint))
        except EngineError as error:
            compilation.error = error
        except Exception as error:
            logger.exception("a rule could not be compiled")
            compilation.error = ConstraintsUnavailableError(f"{type(error).__name__}: {error}")
        counts.compiled += 1
        counts.compile_us += (time.monotonic_ns() - started_ns) // 1000
        compilation.done = True
        del compilation  # it may hold the last reference to its grammar
    if checker is not None:
        checker.close()
