"""RaggedCache: rows and layers of different lengths, growth that is not paid per token, beam reordering."""

from __future__ import annotations

import torch

from pruneops.cache import ChunkAppender, RaggedCache
from pruneops.ragged import RaggedBatch, pack


def batch_of(lengths: list[int]) -> RaggedBatch:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return pack(torch.zeros(len(lengths), longest, 1), mask, None, None, None)


def append(cache: RaggedCache, lengths: list[int], value: float) -> None:
    """Append tokens whose keys are value + row / 10 + offset / 100 to every layer."""
    batch = batch_of(lengths)
    keys = (value + batch.row_ids / 10 + batch.offsets / 100).view(-1, 1, 1)
    appender = ChunkAppender(cache)
    for i, layer in enumerate(cache.layers):
        plan = appender.plan(i, batch)
        layer.write(keys, -keys, plan.destination, plan.after, len(lengths))


def test_tokens_of_every_row_lie_behind_each_other() -> None:
    cache = RaggedCache(2)
    append(cache, [3, 0, 1], 1.0)
    append(cache, [1, 1, 1], 2.0)
    append(cache, [0, 2, 1], 3.0)
    assert cache.lengths(0) == cache.lengths(1) == cache.next_positions(1) == [4, 3, 3]
    expected = [[1.0, 1.01, 1.02, 2.0], [2.1, 3.1, 3.11], [1.2, 2.2, 3.2]]
    for row, values in enumerate(expected):
        torch.testing.assert_close(cache.layers[0].keys[row, : len(values), 0, 0], torch.tensor(values))
        torch.testing.assert_close(cache.layers[1].values[row, : len(values), 0, 0], -torch.tensor(values))


def test_layers_that_hold_the_same_tokens_share_their_lengths() -> None:
    cache = RaggedCache(3)
    append(cache, [3, 2], 1.0)
    states = {id(layer.state) for layer in cache.layers}
    assert len(states) == 1


def test_decoding_copies_the_cache_rarely() -> None:
    cache = RaggedCache(1)
    append(cache, [10, 7], 0.0)
    copies, slots = 0, cache.layers[0].keys
    for _ in range(1000):
        append(cache, [1, 1], 0.0)
        copies += cache.layers[0].keys is not slots
        slots = cache.layers[0].keys
    assert copies <= 8
    assert cache.lengths(0) == [1010, 1007]
    assert slots.shape[1] <= 1.5 * 1010 + 64


def test_reordering_permutes_keys_lengths_and_positions() -> None:
    cache = RaggedCache(2)
    append(cache, [3, 1, 2], 1.0)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert cache.lengths(0) == cache.lengths(1) == [2, 2, 3] == cache.next_positions(0)
    torch.testing.assert_close(cache.layers[0].keys[0, :2, 0, 0], torch.tensor([1.2, 1.21]))
    append(cache, [1, 1, 1], 5.0)
    torch.testing.assert_close(cache.layers[1].keys[2, :4, 0, 0], torch.tensor([1.0, 1.01, 1.02, 5.2]))
    assert len({id(layer.state) for layer in cache.layers}) == 1


def test_rows_may_be_selected_and_repeated() -> None:
    cache = RaggedCache(1)
    append(cache, [3, 1], 1.0)
    cache.batch_repeat_interleave(2)
    assert cache.lengths(0) == [3, 3, 1, 1] and cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.lengths(0) == [3, 1]


def test_bytes_count_what_is_held() -> None:
    cache = RaggedCache(2)
    assert cache.nbytes() == 0
    append(cache, [3, 1], 1.0)
    assert cache.nbytes() == 2 * 2 * 4 * 4
    assert cache.nbytes(used=False) == 2 * 2 * 2 * 64 * 4


def test_a_reset_cache_is_empty() -> None:
    cache = RaggedCache(2)
    append(cache, [3, 1], 1.0)
    cache.advance(3)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized and cache.batch_size == -1
    append(cache, [2, 2], 1.0)
    assert cache.lengths(1) == [2, 2]
