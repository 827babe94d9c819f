"""What can go wrong in the engine core, as types the front maps to statuses."""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors the engine core raises on purpose."""


class StartupError(EngineError):
    """The settings cannot be met on this machine; the text says which and what would help."""


class AdmissionError(EngineError):
    """A sequence was refused; nothing of it is kept."""


class QueueFullError(AdmissionError):
    """The waiting queue is at its limit; the same request may be accepted later."""


class NeverFitsError(AdmissionError):
    """The request exceeds what this engine can ever hold; trying again will not help."""


class InvalidSequenceError(AdmissionError):
    """The request contradicts itself or the model (an empty prompt, an unknown token id)."""


class DuplicateSequenceError(AdmissionError):
    """A live sequence has this id already."""


class DrainingError(AdmissionError):
    """The engine finishes what it has and takes nothing new."""


class AdapterNotFoundError(AdmissionError):
    """No adapter of this name is loaded, or it is being unloaded."""


class AdapterExistsError(EngineError):
    """Another adapter of this name is loaded, or being loaded or unloaded."""


class AdapterLimitError(EngineError):
    """An adapter exceeds what the engine may hold; `setting` is the limit, by CoreSettings."""

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(problem)
        self.setting = setting


class OutOfBlocksError(EngineError):
    """The block pool has fewer free blocks than asked for."""


class IntegrityError(EngineError):
    """An invariant of the core's state does not hold; the process must not go on."""


class FatalEngineError(EngineError):
    """The device or the engine is beyond repair; the process must be replaced."""


class InvalidConstraintError(EngineError):
    """A rule for completions is not valid, not supported or too costly; the text is for the
    caller."""


class ConstraintFailedError(EngineError):
    """A completion cannot go on under its rule: a limit on its complexity is exceeded."""


class ConstraintsUnavailableError(EngineError):
    """Completions of this model cannot be held to rules."""
