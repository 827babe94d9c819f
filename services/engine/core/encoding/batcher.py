"""Which waiting sequences an encoder reads next, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.engine.core.admission import QueueLimits
from services.engine.core.errors import DrainingError, DuplicateSequenceError, IntegrityError
from services.engine.core.messages import EncodeRequest
from services.engine.core.settings import BatcherSettings

# How far one batch moves what is known of the cost of a token.
_LEARNING_RATE = 0.2
# Small batches say little of the cost of a token.
_TELLING_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence in the queue. `turn_s` orders the queue: when it came, and a time as long as it
    will take, so that short ones pass long ones by as long as these have not waited for that."""

    request: EncodeRequest
    came_s: float
    turn_s: float

    @property
    def num_tokens(self) -> int:
        """How many it has."""
        return len(self.request.token_ids)


class DynamicBatcher:
    """Lets sequences wait for each other, and makes batches of those of similar lengths.

    They wait in classes of lengths that double, each in the order of arrival. The class whose first
    sequence has its turn makes the next batch; shorter ones go with it while there is room, longer
    ones never, for the answers of a batch come when all of it is computed. A batch holds at most
    `max_sequences`, and tokens within `max_tokens` and what is computed in `target_s`, but always
    one sequence. Times are of one monotonic clock, in seconds.

    A batch is due at once where it would be full or has one of the preferred sizes, else when its
    oldest sequence has waited for `longest_wait_ms`.
    """

    def __init__(
        self, settings: BatcherSettings, limits: QueueLimits, *, target_s: float = float("inf")
    ) -> None:
        self.draining = False
        self.num_tokens = 0  # of those that wait
        self._limits = limits
        self._max_sequences = settings.max_sequences
        self._max_tokens = settings.max_tokens
        self._longest_wait_s = settings.longest_wait_ms / 1000
        self._preferred = sorted(settings.preferred_sizes)
        self._target_s = target_s
        self._token_s = 0.0  # what computing one takes, as far as is known
        # By class of lengths, by sequence id, in the order of arrival.
        self._classes: dict[int, dict[int, Waiting]] = {}
        self._class_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._class_of)

    def __iter__(self) -> Iterator[Waiting]:
        for waiting in self._classes.values():
            yield from waiting.values()

    def add(self, requests: Sequence[EncodeRequest], now_s: float) -> None:
        """Let sequences wait: all of them or none.

        Raises:
            AdmissionError: there are too many, one is there already, or nothing new is taken.
        """
        if self.draining:
            raise DrainingError("the engine drains")
        new_ids = {request.sequence_id for request in requests}
        if len(new_ids) < len(requests) or not new_ids.isdisjoint(self._class_of):
            raise DuplicateSequenceError("a sequence with this id waits already")
        new_tokens = sum(len(request.token_ids) for request in requests)
        self._limits.check((len(self), self.num_tokens), (len(requests), new_tokens))
        for request in requests:
            num_tokens = len(request.token_ids)
            turn_s = now_s + self._token_s * num_tokens
            length_class = (num_tokens - 1).bit_length()
            waiting = self._classes.setdefault(length_class, {})
            waiting[request.sequence_id] = Waiting(request, now_s, turn_s)
            self._class_of[request.sequence_id] = length_class
        self.num_tokens += new_tokens

    def remove(self, sequence_id: int) -> bool:
        """Let a sequence leave the queue; returns whether it was there."""
        length_class = self._class_of.pop(sequence_id, None)
        if length_class is None:
            return False
        waiting = self._classes[length_class]
        self.num_tokens -= waiting.pop(sequence_id).num_tokens
        if not waiting:
            del self._classes[length_class]
        return True

    def due_in_s(self, now_s: float) -> float | None:
        """When the next batch is due; None: nobody waits."""
        if not self._class_of:
            return None
        fewest = self._preferred[0] if self._preferred else self._max_sequences
        if len(self) >= min(fewest, self._max_sequences) or self.num_tokens >= self._room:
            return 0.0
        came_s = min(first.came_s for first in self._first_of_classes())
        return max(0.0, came_s + self._longest_wait_s - now_s)

    def take(self) -> list[Waiting]:
        """The next batch, which leaves the queue. Precondition: somebody waits."""
        first = min(self._first_of_classes(), key=lambda waiting: waiting.turn_s)
        longest = self._class_of[first.request.sequence_id]
        classes = sorted(each for each in self._classes if each <= longest)
        batch = self._fill(classes[::-1])
        sizes = [size for size in self._preferred if size <= len(batch)]
        if sizes:
            del batch[sizes[-1] :]
        for waiting in batch:
            self.remove(waiting.request.sequence_id)
        return batch

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Say how long a batch took."""
        if num_tokens >= _TELLING_TOKENS:
            measured = seconds / num_tokens
            rate = _LEARNING_RATE if self._token_s else 1.0
            self._token_s += rate * (measured - self._token_s)

    def check_integrity(self) -> None:
        """Check every invariant of the queue.

        Raises:
            IntegrityError: one does not hold.
        """
        found = {
            sequence_id: length_class
            for length_class, waiting in self._classes.items()
            for sequence_id in waiting
        }
        if found != self._class_of or not all(self._classes.values()):
            raise IntegrityError("the classes of lengths and their index disagree")
        if self.num_tokens != sum(waiting.num_tokens for waiting in self):
            raise IntegrityError(f"{self.num_tokens} tokens are counted, but others wait")
        for waiting in self._classes.values():
            came = [each.came_s for each in waiting.values()]
            if came != sorted(came):
                raise IntegrityError("a class of lengths is not in the order of arrival")

    @property
    def _room(self) -> int:
        """The most tokens of a batch."""
        if not self._token_s:
            return self._max_tokens
        return max(1, int(min(self._max_tokens, self._target_s / self._token_s)))

    def _first_of_classes(self) -> Iterator[Waiting]:
        for waiting in self._classes.values():
            yield next(iter(waiting.values()))

    def _fill(self, classes: Sequence[int]) -> list[Waiting]:
        batch: list[Waiting] = []
        room = self._room
        for length_class in classes:
            for waiting in self._classes[length_class].values():
                if batch and waiting.num_tokens > room:
                    break
                batch.append(waiting)
                room -= waiting.num_tokens
                if len(batch) == self._max_sequences:
                    return batch
        return batch
