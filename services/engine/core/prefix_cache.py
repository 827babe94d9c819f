"""Finds what of a sequence is in the KV cache already, by the hashes of its blocks.

A block is known by a hash of its tokens and of the hash of the block before it, hence of all that
its keys and values depend on. The first block's predecessor is the root: a keyed hash of whatever
else decides contents or visibility (tenant, salt). Sequences of two tenants have different roots,
so neither ever hits the other's blocks, and nobody learns another's prompt from how fast an answer
starts. The key is drawn anew by each process and never leaves it: without it nobody can search for
two prompts whose hashes collide.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import blake2b

from services.engine.core.block_pool import BlockPool
from services.engine.core.errors import IntegrityError
from services.engine.core.messages import SequenceRequest
from services.engine.core.sequence import Sequence

# 128 bits: of 2**40 blocks, two collide by chance with a probability of 2**-49.
_HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence the KV cache holds: its first `num_tokens` tokens.

    `blocks` are full and shared as they are. The rest of the tokens, if any, lie in the beginning
    of `copied_block`, which the sequence is going to write to and therefore copies.
    """

    blocks: list[int]
    copied_block: int | None
    num_tokens: int

    @classmethod
    def of(cls, blocks: list[int], num_tokens: int, block_size: int) -> Match:
        """The match of the first `num_tokens` tokens that `blocks` hold."""
        full, rest = divmod(num_tokens, block_size)
        return cls(blocks[:full], blocks[full] if rest else None, num_tokens)

    @property
    def held_blocks(self) -> list[int]:
        """The blocks that must not go to anybody else until the copy is made."""
        return self.blocks if self.copied_block is None else [*self.blocks, self.copied_block]

    def without_copy(self, block_size: int) -> Match:
        """The same match, its full blocks only."""
        return Match(self.blocks, None, len(self.blocks) * block_size)


class PrefixCache:
    """Publishes the blocks that sequences have computed and finds them for others.

    A sequence hashes each of its blocks once. Nothing is done per token: in decode, one block in
    `block_size` steps is hashed and published, in about a microsecond.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._key = secrets.token_bytes(32)

    def match(self, sequence: Sequence) -> Match:
        """The longest prefix of `sequence` that published blocks hold.

        At least one token is left to compute: only that gives the logits to sample from. Of a
        prompt that is to be scored, all are left whose logits say something new.
        """
        blocks: list[int] = []
        if self.enabled:
            for block_hash in self.known_hashes(sequence):
                block = self._pool.find(block_hash)
                if block is None:
                    break
                blocks.append(block)
        size = self._pool.block_size
        return Match.of(blocks, min(len(blocks) * size, sequence.most_cached_tokens), size)

    def known_hashes(self, sequence: Sequence) -> list[bytes]:
        """The hashes of all blocks that the known tokens of `sequence` fill."""
        self._hash_blocks(sequence, sequence.num_tokens // self._pool.block_size)
        return sequence.block_hashes

    def adopt(self, sequence: Sequence, match: Match) -> None:
        """Note that `sequence` begins with the blocks of `match`, which are published."""
        if self.enabled:
            self._hash_blocks(sequence, len(match.blocks))
            sequence.num_published_blocks = len(match.blocks)

    def publish(self, sequence: Sequence) -> None:
        """Let the blocks be found that `sequence` has filled with computed tokens.

        To be called only once a sampled token has shown that what was computed is sound: a
        sequence that fails must leave nothing behind for others to trip over.
        """
        computed = min(sequence.num_computed_tokens, len(sequence.token_ids))
        full = computed // self._pool.block_size
        if full <= sequence.num_published_blocks or not self.enabled:
            return
        self._hash_blocks(sequence, full)
        for index in range(sequence.num_published_blocks, full):
            self._pool.publish(sequence.block_table[index], sequence.block_hashes[index])
        sequence.num_published_blocks = full

    def check_integrity(self, sequence: Sequence) -> None:
        """Check that the blocks of a running sequence are found by no hash but their own.

        Raises:
            IntegrityError: one is, or one that must not be found yet can be.
        """
        published = sequence.num_published_blocks
        for index, block in enumerate(sequence.block_table):
            found_by = self._pool.hash_of(block)
            own = sequence.block_hashes[index] if index < published else None
            if found_by is not None and found_by != own:
                raise IntegrityError(
                    f"block {index} of sequence {sequence.sequence_id} is found by a wrong hash"
                )

    def _hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        hashes = sequence.block_hashes
        if len(hashes) >= num_blocks:
            return
        size = self._pool.block_size
        tokens = sequence.token_ids[len(hashes) * size : num_blocks * size].tobytes()
        width = len(tokens) // (num_blocks - len(hashes))
        parent = hashes[-1] if hashes else self._root(sequence.request)
        for start in range(0, len(tokens), width):
            parent = blake2b(
                parent + tokens[start : start + width], digest_size=_HASH_BYTES
            ).digest()
            hashes.append(parent)

    def _root(self, request: SequenceRequest) -> bytes:
        tenant = request.tenant.encode()
        # The length keeps ("ab", "c") apart from ("a", "bc").
        name = len(tenant).to_bytes(8, "little") + tenant + request.cache_salt
        return blake2b(name, digest_size=_HASH_BYTES, key=self._key).digest()
