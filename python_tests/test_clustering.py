"""dpc_knn finds the clusters that its definition names."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pruneops import ops, reference
from pruneops.ops import DPCKNNResult
from pruneops.testing import (
    LENGTHS,
    assert_bitwise_equal,
    assert_repeatable,
    cu_seqlens_of,
    strided,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["native", "reference"])
INF, NAN = math.inf, math.nan


def lattice(total: int, channels: int = 4) -> Tensor:
    """Points with small whole coordinates: exact in every dtype, with many duplicates and equal distances."""
    return torch.randint(0, 5, (total, channels)).float()


def random_counts(lengths: tuple[int, ...]) -> list[int]:
    rng = random.Random(0)
    return [rng.choice((-2, 0, 1, n // 2, n, n + 3)) for n in lengths]


# ---------------------------------------------------------------------- the definition


def cluster_by_definition(
    points: list[list[float]], count: int, k: int, noise: list[float] | None
) -> tuple[list[int], list[int], list[float], list[float]]:
    """Ids, centres, density and delta of one segment in plain Python."""
    rows = range(len(points))
    squared = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / len(p) for q in points] for p in points]
    squared = [[INF if math.isnan(d) else d for d in row] for row in squared]
    for i in rows:
        squared[i][i] = 0.0
    k = min(k, len(points))
    density = [math.exp(-sum(sorted(row)[:k]) / k) + (noise[i] * 1e-6 if noise else 0) for i, row in enumerate(squared)]

    def denser(j: int, i: int) -> bool:
        return density[j] > density[i] or (noise is None and density[j] == density[i] and j < i)

    largest = max(max(row) for row in squared)
    delta = [math.sqrt(min([squared[i][j] for j in rows if denser(j, i)], default=largest)) for i in rows]
    score = [d * p if d * p == d * p else -INF for d, p in zip(delta, density, strict=True)]
    centers = sorted(rows, key=lambda i: (-score[i], i))[: max(1, min(count, len(points)))]
    ids = [min(range(len(centers)), key=lambda c: (squared[centers[c]][i], c)) for i in rows]
    for rank, center in enumerate(centers):
        ids[center] = rank
    return ids, centers, density, delta


@BACKENDS
@pytest.mark.parametrize("noisy", [False, True], ids=["lowest-index", "noise"])
@pytest.mark.parametrize("k", [1, 4, 200])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_segment_is_clustered_as_the_definition_says(lengths, k, noisy, backend):
    total = sum(lengths) + 3
    x, counts = lattice(total), random_counts(lengths)
    # Steps of 2.5e-7 are more than float32 rounds away, and equal ones leave ties.
    noise = torch.randint(0, 4, (total,)) / 4 if noisy else None
    result = backend.dpc_knn(x, cu_seqlens_of(lengths), counts, k=k, noise=noise)
    assert result.cluster_ids.dtype == result.center_indices.dtype == result.cu_clusters.dtype == torch.int32
    assert result.density.dtype == result.delta.dtype == result.score.dtype == torch.float32
    start, ends = 0, [0]
    ids, centers, density, delta = [], [], [], []
    for length, count in zip(lengths, counts, strict=True):
        if length:
            rows = slice(start, start + length)
            draws = None if noise is None else noise[rows].tolist()
            found = cluster_by_definition(x[rows].tolist(), count, k, draws)
            ids += found[0]
            centers += [start + center for center in found[1]]
            density += found[2]
            delta += found[3]
        start += length
        ends.append(len(centers))
    assert result.cluster_ids.tolist() == ids + [-1] * 3
    assert result.center_indices.tolist() == centers
    assert result.cu_clusters.tolist() == ends
    expected = torch.tensor([density + [0.0] * 3, delta + [0.0] * 3])
    torch.testing.assert_close(result.density, expected[0], rtol=3e-7, atol=2e-7)
    torch.testing.assert_close(result.delta, expected[1], rtol=3e-7, atol=0.0)
    assert torch.equal(result.score, result.delta * result.density)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_where_arithmetic_is_exact_native_equals_reference(lengths, dtype, native_calls):
    """Ties of distances, densities and scores included."""
    x, cu_seqlens = lattice(sum(lengths), 16).to(dtype), cu_seqlens_of(lengths)
    ours = ops.dpc_knn(x, cu_seqlens, 6, k=5)
    expected = reference.dpc_knn(x, cu_seqlens, 6, k=5)
    for name in ("cluster_ids", "center_indices", "cu_clusters"):
        assert_bitwise_equal(getattr(ours, name), getattr(expected, name), name)


# ---------------------------------------------------------------------- exactness


def smooth_video(n: int, channels: int) -> Tensor:
    """A few scenes with small changes on top of one large vector, as features of neighbouring frames have."""
    scenes = torch.randn(max(n // 9, 1), channels)
    return 60 * torch.randn(channels) + scenes[torch.arange(n) % len(scenes)] + 0.02 * torch.randn(n, channels)


DATA = {
    "random": torch.randn,
    "near-duplicates": smooth_video,
    "two-far-groups": lambda n, c: torch.randn(n, c) + 30 * (torch.arange(n)[:, None] % 2),
    "one-far-row": lambda n, c: torch.randn(n, c) * torch.where(torch.arange(n) == n // 2, 1000.0, 1.0)[:, None],
    "duplicates": lambda n, c: torch.randn(n, c)[torch.randint(0, n, (n,))],
}


def mismatches(ours: DPCKNNResult, x: Tensor, lengths: tuple[int, ...], k: int, noise: Tensor) -> tuple[int, int]:
    """Decisions that differ from those of float64 arithmetic: all, and those that differ by more than the margin.

    The margin is 1e-6 of the largest distance of the segment for distances, and 1e-6 for densities. A row whose denser
    rows are uncertain by that has an interval for its delta, and thereby for its score.
    """
    exact = reference.dpc_knn(x.double(), cu_seqlens_of(lengths), 0, k=k, noise=noise.double())
    differing = beyond = start = 0
    for b, length in enumerate(lengths):
        rows = slice(start, start + length)
        start += length
        if length == 0:
            continue
        wide = x[rows].double()
        distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
        margin = 1e-6 * float(distances.max())
        apart = exact.density[rows] - exact.density[rows][:, None]  # [i, j]: how much denser j is than i
        apart.fill_diagonal_(-INF)

        def delta(denser: Tensor, distances: Tensor = distances) -> Tensor:
            nearest = distances.masked_fill(~denser, INF).amin(-1)
            return torch.where(denser.any(-1), nearest, distances.max())

        bounds = torch.stack([delta(apart > -1e-6), delta(apart > 1e-6), delta(apart > 0)])
        low = (bounds.amin(0) - margin) * (exact.density[rows] - 1e-6)
        high = (bounds.amax(0) + margin) * (exact.density[rows] + 1e-6)
        centers = ours.center_indices[ours.cu_clusters[b] : ours.cu_clusters[b + 1]].long() - rows.start
        left = torch.ones(length, dtype=torch.bool)
        for center in centers.tolist():
            left[center] = False
            beyond += int((low[left] > high[center]).sum())
        best = (bounds[2] * exact.density[rows]).argsort(descending=True, stable=True)[: len(centers)]
        differing += int((best != centers).sum())
        ids = ours.cluster_ids[rows].long()
        others = ~torch.isin(torch.arange(length), centers)
        chosen = distances[centers[ids], torch.arange(length)]
        nearest = distances[centers].amin(0)
        differing += int((chosen != nearest)[others].sum())
        beyond += int((chosen > nearest + margin)[others].sum())
        assert ids[centers].tolist() == list(range(len(centers)))
    return differing, beyond


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("channels", [3, 40, 700])
def test_decisions_equal_those_of_float64_beyond_a_margin_of_1e6(channels, kind, dtype, native_calls, record_property):
    lengths = (1, 150, 33, 0, 97)
    x = torch.cat([DATA[kind](max(n, 1), channels)[:n] for n in lengths]).to(dtype)
    noise = torch.rand(sum(lengths))
    ours = ops.dpc_knn(x, cu_seqlens_of(lengths), [n // 2 for n in lengths], k=7, noise=noise)
    differing, beyond = mismatches(ours, x, lengths, 7, noise)
    record_property("mismatches", differing)
    assert beyond == 0
    if not kind.endswith("duplicates"):  # whose densities differ by less than the margin
        assert differing <= 4


def test_the_margin_test_notices_a_wrong_centre_and_a_wrong_id():
    lengths, x, noise = (60,), torch.randn(60, 8), torch.rand(60)
    result = ops.dpc_knn(x, cu_seqlens_of(lengths), 9, k=5, noise=noise)
    assert mismatches(result, x, lengths, 5, noise)[1] == 0
    swapped = result.center_indices[[1, 0, *range(2, 9)]]
    ids = torch.where(result.cluster_ids < 2, 1 - result.cluster_ids, result.cluster_ids)
    assert mismatches(result._replace(center_indices=swapped, cluster_ids=ids), x, lengths, 5, noise)[1] > 0
    moved = (result.cluster_ids + 1) % 9
    moved[result.center_indices.long()] = torch.arange(9, dtype=torch.int32)
    assert mismatches(result._replace(cluster_ids=moved), x, lengths, 5, noise)[1] > 0


@pytest.mark.parametrize("kind", DATA)
def test_distances_are_accurate_to_float32(kind, native_calls):
    """Also between near duplicates far from the origin, where a matrix product in float32 cancels."""
    x = DATA[kind](200, 512)
    noise = torch.rand(200)
    ours = ops.dpc_knn(x, cu_seqlens_of([200]), 20, k=7, noise=noise)
    exact = reference.dpc_knn(x.double(), cu_seqlens_of([200]), 20, k=7, noise=noise.double())
    torch.testing.assert_close(ours.density.double(), exact.density, rtol=1e-6, atol=3e-7)
    same = ours.density.argsort(stable=True) == exact.density.argsort(stable=True)
    if same.all():
        torch.testing.assert_close(ours.delta.double(), exact.delta, rtol=2e-6, atol=1e-7 * float(exact.delta.max()))


def test_equal_rows_have_equal_densities_wherever_they_lie(native_calls):
    """The lower of two equal rows is the denser one, so the other has a delta of exactly 0."""
    x = torch.randn(60, 300).repeat(3, 1)[torch.randperm(180)] + 5.0
    result = ops.dpc_knn(x, cu_seqlens_of([180]), 60, k=7)
    equal = (x[:, None] == x).all(-1)
    first = equal.int().argmax(1)
    assert torch.equal(result.density, result.density[first])
    later = first != torch.arange(180)
    assert (result.delta[later] == 0).all() and (result.delta[~later] > 0).all()
    assert sorted(result.center_indices.tolist()) == sorted(set(first.tolist()))
    assert torch.equal(result.cluster_ids, result.cluster_ids[first])


# ---------------------------------------------------------------------- single rules


def test_equal_densities_the_lower_row_is_denser_without_noise_and_neither_with_noise(native_calls):
    x, cu_seqlens = torch.tensor([[0.0], [2.0]]), cu_seqlens_of([2])
    without = ops.dpc_knn(x, cu_seqlens, 1, k=2)
    assert without.delta.tolist() == [2.0, 2.0] and without.center_indices.tolist() == [0]
    # Two tied pairs: without noise only row 0 has no denser row.
    x, cu_seqlens = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), cu_seqlens_of([4])
    without = ops.dpc_knn(x, cu_seqlens, 2, k=2)
    assert without.delta.tolist() == [11.0, 1.0, 9.0, 1.0]
    assert without.center_indices.tolist() == [0, 2] and without.cluster_ids.tolist() == [0, 0, 1, 1]
    strict = ops.dpc_knn(x, cu_seqlens, 2, k=2, noise=torch.zeros(4))
    assert strict.delta.tolist() == [11.0] * 4 and strict.center_indices.tolist() == [0, 1]


def test_noise_is_added_to_the_density_in_millionths(native_calls):
    x, noise = torch.zeros(3, 5), torch.tensor([0.5, 1.0, 0.0])
    result = ops.dpc_knn(x, cu_seqlens_of([3]), 1, k=2, noise=noise)
    assert torch.equal(result.density, torch.ones(3) + noise * 1e-6)


@BACKENDS
@pytest.mark.parametrize("count", [1, 3, 9])
def test_rows_that_are_all_equal_become_centres_in_order(count, backend):
    result = backend.dpc_knn(torch.full((9, 5), 0.3), cu_seqlens_of([9]), count, k=4)
    assert result.density.tolist() == [1.0] * 9 and result.delta.tolist() == [0.0] * 9
    assert result.center_indices.tolist() == list(range(count))
    assert result.cluster_ids.tolist() == [*range(count), *[0] * (9 - count)]


@BACKENDS
def test_a_single_row_is_its_own_cluster(backend):
    result = backend.dpc_knn(torch.randn(3, 4), cu_seqlens_of([1, 1, 1]), [0, 1, 5], k=7)
    assert result.cluster_ids.tolist() == [0, 0, 0] and result.center_indices.tolist() == [0, 1, 2]
    assert result.cu_clusters.tolist() == [0, 1, 2, 3]
    assert result.density.tolist() == [1.0] * 3 and result.delta.tolist() == [0.0] * 3


@BACKENDS
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_is_infinitely_far_from_all_others(broken, backend):
    x = lattice(40, 20)
    x[7, 3] = broken
    result = backend.dpc_knn(x, cu_seqlens_of([40]), 5, k=4)
    others = torch.arange(40) != 7
    alone = backend.dpc_knn(x[others], cu_seqlens_of([39]), 5, k=4)
    assert result.density[7] == 0.0 and result.delta[7] == INF and result.score[7].isnan()
    assert_bitwise_equal(result.density[others], alone.density)
    # The row without a denser one takes the largest distance, which is infinite now.
    top = int(result.delta[others].argmax())
    assert result.delta[others][top] == INF
    assert_bitwise_equal(result.delta[others][torch.arange(39) != top], alone.delta[torch.arange(39) != top])
    assert result.center_indices[0] == torch.arange(40)[others][top]
    assert result.cluster_ids[7] == 0 and 7 not in result.center_indices


@BACKENDS
def test_rows_that_are_all_not_numbers_form_the_clusters_asked_for(backend):
    result = backend.dpc_knn(torch.full((4, 3), NAN), cu_seqlens_of([4]), 2, k=2)
    assert result.density.tolist() == [0.0] * 4 and result.center_indices.tolist() == [0, 1]
    assert result.cluster_ids.tolist() == [0, 1, 0, 0]
    single = backend.dpc_knn(torch.full((4, 3), NAN), cu_seqlens_of([4]), 2, k=1)
    assert single.density.tolist() == [1.0] * 4 and single.delta.tolist() == [INF] * 4


@BACKENDS
def test_rows_without_channels_coincide(backend):
    result = backend.dpc_knn(torch.zeros(5, 0), cu_seqlens_of([5]), 2, k=3)
    assert result.density.tolist() == [1.0] * 5 and result.cluster_ids.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 2, 32, 33, 64, 500])
def test_any_number_of_neighbours_makes_the_density(k, native_calls):
    x = torch.randn(130, 6)
    result = ops.dpc_knn(x, cu_seqlens_of([130]), 9, k=k)
    expected = reference.dpc_knn(x.double(), cu_seqlens_of([130]), 9, k=k)
    torch.testing.assert_close(result.density.double(), expected.density, rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------------- forms of the arguments


@pytest.mark.parametrize("form", ["int", "list", "int32", "int64", "uint8"])
def test_counts_may_come_in_any_integer_form(form, native_calls):
    x, cu_seqlens = torch.randn(12, 3), cu_seqlens_of([5, 0, 7])
    counts = {"int": 3, "list": [3, 3, 3]}.get(form)
    if counts is None:
        counts = torch.tensor([3, 3, 3], dtype=getattr(torch, form))
    expected = reference.dpc_knn(x, cu_seqlens, [3, 3, 3], k=4)
    ours = ops.dpc_knn(x, cu_seqlens, counts, k=4)
    assert_bitwise_equal(ours.cluster_ids, expected.cluster_ids)


@BACKENDS
@pytest.mark.parametrize("capacity", [0, 1, 3, 4, 8, 20])
def test_centres_past_the_capacity_are_cut_and_rows_go_to_those_that_are_left(capacity, backend):
    lengths, x = (6, 0, 5, 4), lattice(17)
    counts = torch.tensor([3, 2, 9, 0], dtype=torch.int32)
    full = backend.dpc_knn(x, cu_seqlens_of(lengths), counts, k=3)
    assert full.cu_clusters.tolist() == [0, 3, 3, 8, 9] and full.center_indices.shape == (9,)
    cut = backend.dpc_knn(x, cu_seqlens_of(lengths), counts, k=3, capacity=capacity)
    ends = full.cu_clusters.clamp(max=capacity)
    kept = int(ends[-1])
    assert cut.cu_clusters.tolist() == ends.tolist()
    assert cut.center_indices.tolist() == full.center_indices[:kept].tolist() + [-1] * (capacity - kept)
    assert_bitwise_equal(cut[2:5], full[2:5])
    start = 0
    for b, length in enumerate(lengths):
        rows, left = slice(start, start + length), int(ends[b + 1] - ends[b])
        start += length
        if length == 0:
            continue
        ids = cut.cluster_ids[rows].tolist()
        if left == 0:
            assert ids == [-1] * length
        else:
            alone = backend.dpc_knn(x[rows], cu_seqlens_of([length]), left, k=3)
            assert ids == alone.cluster_ids.tolist()
    assert cut.cluster_ids[start:].tolist() == [-1, -1]


def test_max_seqlen_is_only_a_bound(native_calls):
    x, cu_seqlens = torch.randn(50, 8), cu_seqlens_of([20, 30])
    expected = ops.dpc_knn(x, cu_seqlens, 4, k=3)
    for bound in (30, 50, 100_000):
        assert_bitwise_equal(ops.dpc_knn(x, cu_seqlens, 4, k=3, max_seqlen=bound), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_same_result(dtype, native_calls):
    x, cu_seqlens = torch.randn(40, 37).to(dtype), cu_seqlens_of([15, 0, 25])
    noise = torch.rand(40)
    expected = ops.dpc_knn(x, cu_seqlens, 6, k=5, noise=noise)
    for other in (strided(x), x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0]):
        ours = ops.dpc_knn(other, cu_seqlens, 6, k=5, noise=torch.stack([noise, noise], 1)[:, 0])
        assert_bitwise_equal(ours, expected)


def test_two_runs_are_equal_whatever_memory_held(native_calls):
    x, cu_seqlens = torch.randn(303, 20), cu_seqlens_of([120, 0, 180])
    assert_repeatable(lambda: ops.dpc_knn(x, cu_seqlens, 30, k=5, capacity=70))


def test_clustering_has_no_gradient(native_calls):
    x = torch.randn(6, 2, requires_grad=True)
    result = ops.dpc_knn(x, cu_seqlens_of([6]), 2, k=2, noise=torch.rand(6, requires_grad=True))
    assert not any(tensor.requires_grad for tensor in result)


@pytest.mark.usefixtures("unforced")
def test_float64_is_clustered_in_float64():
    x = torch.tensor([[0.0], [1.0], [2.0 + 1e-12]], dtype=torch.float64)
    result = ops.dpc_knn(x, cu_seqlens_of([3]), 2, k=2)
    assert result.density.dtype == torch.float64 and result.density[0] > result.density[2]


def test_reference_can_take_the_distances_of_cdist():
    """They differ from accurate ones by what a matrix product in float32 rounds."""
    x = torch.randn(80, 16) + 20
    noise = torch.rand(80)
    exact, rounded = (
        reference.dpc_knn(x, cu_seqlens_of([80]), 9, k=5, noise=noise, exact_cdist=flag) for flag in (False, True)
    )
    distances = torch.cdist(x[None], x[None])[0] / 4.0
    density = (-distances.topk(5, largest=False).values.square().mean(-1)).exp() + noise * 1e-6
    assert torch.equal(rounded.density, density)
    assert not torch.equal(rounded.density, exact.density)
    torch.testing.assert_close(rounded.density, exact.density, rtol=1e-3, atol=0.0)


# ---------------------------------------------------------------------- long segments


def test_a_segment_too_long_to_store_its_distances_follows_the_same_rules(native_calls):
    """Checked row by row in float64, beside a short segment that is stored."""
    lengths, k, count = (4200, 50), 7, 40
    x = torch.randn(sum(lengths), 6)
    result = ops.dpc_knn(x, cu_seqlens_of(lengths), count, k=k)
    short = ops.dpc_knn(x[4200:], cu_seqlens_of([50]), count, k=k)
    assert_bitwise_equal(result.density[4200:], short.density)
    assert_bitwise_equal(result.cluster_ids[4200:], short.cluster_ids)
    wide, density, rows = x[:4200].double(), result.density[:4200], torch.arange(4200)
    centers = result.center_indices[:count].long()
    assert centers.tolist() == result.score[:4200].argsort(descending=True, stable=True)[:count].tolist()
    largest = 0.0
    for part in rows.split(600):
        distances = torch.cdist(wide[part], wide, compute_mode="donot_use_mm_for_euclid_dist") / 6**0.5
        largest = max(largest, float(distances.max()))
        nearest = distances.topk(k, largest=False).values.square().mean(-1)
        torch.testing.assert_close(density[part].double(), (-nearest).exp(), rtol=1e-6, atol=0.0)
        denser = (density > density[part, None]) | ((density == density[part, None]) & (rows < part[:, None]))
        delta = distances.masked_fill(~denser, INF).amin(-1)
        found = delta.isfinite()
        torch.testing.assert_close(result.delta[part][found].double(), delta[found], rtol=3e-6, atol=0.0)
        others = ~torch.isin(part, centers)
        chosen = distances.gather(1, centers[result.cluster_ids[part].long()][:, None])[:, 0]
        assert (chosen <= distances[:, centers].amin(-1) + 1e-6 * largest)[others].all()
    assert result.cluster_ids[centers].tolist() == list(range(count))
    assert result.delta[density.argmax()] == pytest.approx(largest, rel=1e-6)


# Runs in a process of its own: the peak of a process never goes down again.
PEAK_PROGRAM = """
import resource
import sys

import torch

from pruneops import backends, ops


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(n: int) -> None:
    x, cu = torch.randn(n, 4), torch.tensor([0, n], dtype=torch.int32)
    clusters = ops.dpc_knn(x, cu, n // 64, k=5)
    ops.merge_mean(x, clusters.cluster_ids, cu, n // 64)


with backends.record_calls() as calls:
    work(64)
    before = peak()
    work(int(sys.argv[1]))
assert {backend for _, backend in calls} == {"native"}, calls
print(peak() - before)
"""


@pytest.mark.parametrize("length", [16384, pytest.param(65536, marks=pytest.mark.slow)])
def test_peak_memory_is_far_below_a_distance_matrix(length):
    result = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, str(length)],
        env={**os.environ, "PRUNEOPS_BACKEND": "native"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    # 1 GB and 17 GB; ours needs some 100 bytes a row.
    assert int(result.stdout) < 32 * 2**20
