"""Who waits for a prefill under way, to share its blocks instead of computing the same again.

Choices of one request, and requests of a burst that begin alike, arrive before the first of them
has computed anything. The first to enter leads: the others wait beside the queue until its prompt
is computed, and then share its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.engine.core.errors import IntegrityError
from services.engine.core.prefix_cache import Match, PrefixCache
from services.engine.core.sequence import Sequence, SequenceState


class PrefillSharing:
    """Knows the blocks that running prefills are going to publish, and who waits for them.

    Nobody waits for a leader of lower priority, and nobody waits whom it would not help: what is
    saved must be at least half of what the leader has still to compute. So a short prompt does not
    wait for a long one just because both begin with the same few words.

    A leader is registered from its entry until its first token, or until it leaves early; either
    way `finish` then gives back those who wait for it. A leader runs, so it gets there.
    """

    def __init__(self, prefix_cache: PrefixCache, block_size: int) -> None:
        self._prefix_cache = prefix_cache
        self._block_size = block_size
        self._followers: dict[Sequence, list[Sequence]] = {}  # by leader
        self._leaders: dict[bytes, Sequence] = {}  # by the hash of a block to be published

    def __len__(self) -> int:
        return sum(map(len, self._followers.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (follower for followers in self._followers.values() for follower in followers)

    def __contains__(self, leader: Sequence) -> bool:
        return leader in self._followers

    def lead(self, sequence: Sequence) -> None:
        """Register a sequence that begins to compute what it knows, and what it will publish."""
        self._followers[sequence] = []
        for block_hash in self._announced(sequence):
            self._leaders.setdefault(block_hash, sequence)

    def leader_for(self, sequence: Sequence, match: Match) -> Sequence | None:
        """The running prefill that `sequence`, of which `match` is there already, should await."""
        original = sequence.fork_of
        if original is not None and original in self._followers:
            return original
        if not self._leaders or sequence.num_unscored_tokens:
            return None
        hashes = self._prefix_cache.known_hashes(sequence)
        first = index = -(-match.num_tokens // self._block_size)
        leader = self._leaders.get(hashes[first]) if first < len(hashes) else None
        if leader is None or leader.priority < sequence.priority:
            return None
        while index < len(hashes) and self._leaders.get(hashes[index]) is leader:
            index += 1
        saved_tokens = (index - first) * self._block_size
        return leader if 2 * saved_tokens >= leader.num_uncomputed_tokens else None

    def wait(self, sequence: Sequence, leader: Sequence) -> None:
        """Let `sequence` wait until `leader` has finished its prefill."""
        self._followers[leader].append(sequence)
        sequence.awaits = leader

    def finish(self, leader: Sequence) -> list[Sequence]:
        """End the lead of a sequence; returns those who waited for it, for the queue."""
        followers = self._followers.pop(leader)
        for follower in followers:
            follower.awaits = None
        for block_hash in self._announced(leader):
            if self._leaders.get(block_hash) is leader:
                del self._leaders[block_hash]
        return followers

    def remove(self, follower: Sequence) -> None:
        """Forget a sequence that waits for a leader."""
        assert follower.awaits is not None, "a follower awaits its leader"
        self._followers[follower.awaits].remove(follower)
        follower.awaits = None

    def check_integrity(self) -> None:
        """Check that leaders run and that their followers wait for them.

        Raises:
            IntegrityError: one does not.
        """
        for leader, followers in self._followers.items():
            if leader.state is not SequenceState.RUNNING:
                raise IntegrityError("a sequence leads that does not run")
            for follower in followers:
                if follower.awaits is not leader or follower.state is not SequenceState.WAITING:
                    raise IntegrityError("a follower does not wait for its leader")
        if any(leader not in self._followers for leader in self._leaders.values()):
            raise IntegrityError("blocks are announced by a sequence that does not lead")

    def _announced(self, leader: Sequence) -> list[bytes]:
        return self._prefix_cache.known_hashes(leader) if self._prefix_cache.enabled else []
