"""Compiles rules on a thread beside the steps, and keeps what it has compiled."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

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


class Compiler:
    """Compiles each rule once, in the order they are asked for.

    Nothing is loaded or started before the first is: who sends no rules pays nothing.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary]) -> None:
        self.compiled = 0  # rules, faulty ones included
        self.found = 0  # that were compiled, or being compiled, when they were asked for
        self.compile_us = 0  # spent on them
        self._read_vocabulary = read_vocabulary
        self._kept: OrderedDict[Constraint, Compilation] = OrderedDict()
        self._kept_bytes = 0
        self._work: queue.SimpleQueue[Compilation | None] | None = None

    def compile(self, constraint: Constraint) -> Compilation:
        """Have a rule compiled; the same compilation for the same rule."""
        compilation = self._kept.get(constraint)
        if compilation is not None and not _is_passing(compilation):
            self.found += 1
            self._kept.move_to_end(constraint)
            return compilation
        compilation = self._kept[constraint] = Compilation(constraint)
        self._kept_bytes += len(constraint.text)
        while len(self._kept) > _MAX_KEPT or (
            self._kept_bytes > _MAX_KEPT_BYTES and len(self._kept) > 1
        ):
            dropped, _ = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped.text)
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(
                target=self._work_off, args=(self._work,), name="constraints", daemon=True
            ).start()
        self._work.put(compilation)
        return compilation

    def close(self) -> None:
        """End the thread and its checker."""
        if self._work is not None:
            self._work.put(None)
            self._work = None

    def _work_off(self, work: queue.SimpleQueue[Compilation | None]) -> None:
        tokens: Tokens | None = None
        checker: CheckProcess | None = None
        while (compilation := work.get()) is not None:
            started_ns = time.monotonic_ns()
            try:
                if tokens is None or checker is None:
                    vocabulary = self._read_vocabulary()
                    checker = CheckProcess(vocabulary)
                    tokens = Tokens(vocabulary)
                compilation.grammar = tokens.compile(checker.check(compilation.constraint))
            except EngineError as error:
                compilation.error = error
            except Exception as error:
                logger.exception("constraints cannot be compiled")
                compilation.error = ConstraintsUnavailableError(f"{type(error).__name__}: {error}")
            self.compiled += 1
            self.compile_us += (time.monotonic_ns() - started_ns) // 1000
            compilation.done = True
        if checker is not None:
            checker.close()


def _is_passing(compilation: Compilation) -> bool:
    """Whether trying again may end otherwise."""
    return isinstance(compilation.error, ConstraintsUnavailableError)
