"""Cache keys that differ anywhere never name the same entry."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from meshserve.v1 import cache_pb2
from services.cache.keys import EntryKey

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
cache_keys = st.builds(cache_pb2.CacheKey, scope=names, model=names, request=st.binary(max_size=12))


@given(cache_keys, cache_keys)
def test_different_keys_name_different_entries(first, second):
    assume(first != second)
    assert EntryKey.of(first).answer != EntryKey.of(second).answer


@given(cache_keys)
def test_equal_keys_name_the_same_entry(key):
    copy = cache_pb2.CacheKey.FromString(key.SerializeToString())
    assert EntryKey.of(copy) == EntryKey.of(key)


def test_bytes_moved_over_a_boundary_name_another_entry():
    keys = [
        cache_pb2.CacheKey(scope="ab", model="c", request=b"d"),
        cache_pb2.CacheKey(scope="a", model="bc", request=b"d"),
        cache_pb2.CacheKey(scope="a", model="b", request=b"cd"),
    ]
    assert len({EntryKey.of(key).digest for key in keys}) == 3


@given(cache_keys)
def test_key_names_show_nothing_of_the_request(key):
    entry = EntryKey.of(key)
    allowed = set("0123456789abcdefghijklmnopqrstuvwxyz:{}")
    for name in (entry.answer, entry.lease, entry.barrier, entry.index, *entry.generations):
        assert set(name) <= allowed
        assert len(name) < 128


def test_what_a_script_touches_together_shares_a_hash_tag():
    entry = EntryKey.of(cache_pb2.CacheKey(scope="s", model="m", request=b"r"))

    def tag(name: str) -> str:
        return name[name.index("{") : name.index("}")]

    assert len({tag(name) for name in (entry.answer, entry.lease, entry.barrier)}) == 1
    assert len({tag(name) for name in (entry.index, *entry.generations)}) == 1
