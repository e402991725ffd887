"""Random dropping and average pooling on whole models: what is kept, for whom, and that every way of running agrees."""

from __future__ import annotations

import pytest
import tiny
import torch

import pruneops
from pruneops.methods import AveragePool, PruningMethod, PyramidDrop, RandomDrop, method_from_dict

ROWS = [
    tiny.row(3, 1, 5, seed=1),
    tiny.row(2, 1, 9, seed=2),
    tiny.row(6, 0, 4, seed=3),
    tiny.row(0, 2, 3, seed=4, between=0),
]
BASELINES = [RandomDrop((0, 2), (0.5, 0.25)), AveragePool(), AveragePool(3, 1)]


def kept(method: PruningMethod, inputs: dict[str, torch.Tensor]) -> dict[tuple[int, int], list[int]]:
    """Surviving tokens by stage and row."""
    model = tiny.llava()
    with pruneops.prune(model, method, record=True) as run, torch.no_grad():
        model(**inputs)
    return {(record.stage, record.row): record.kept_positions.tolist() for record in run.records}


@pytest.mark.parametrize("method", BASELINES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_generates_what_its_rows_generate_alone(method: PruningMethod, side: str) -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS, side)
    with pruneops.prune(model, method):
        together = tiny.generated(model, batch, max_new_tokens=5)
        alone = [tiny.generated(model, inputs, max_new_tokens=5)[0] for inputs in tiny.rows_alone(batch, ROWS)]
        uncached = tiny.generated(model, batch, max_new_tokens=5, use_cache=False)
    assert together == alone == uncached


@pytest.mark.parametrize("method", BASELINES, ids=str)
def test_a_baseline_trains_and_survives_its_dict(method: PruningMethod) -> None:
    assert method_from_dict(method.to_dict()) == method
    model = tiny.llava().train()
    batch = tiny.llava_batch(ROWS)
    with pruneops.prune(model, method):
        model(**batch, labels=torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


# -- RandomDrop --------------------------------------------------------------------------------------------------------


def test_random_dropping_keeps_as_many_tokens_as_pyramiddrop_and_a_part_of_what_was_left() -> None:
    batch = tiny.llava_batch(ROWS)
    ours = kept(RandomDrop((1, 3), (0.5, 0.25)), batch)
    theirs = kept(PyramidDrop((1, 3), (0.5, 0.25)), batch)
    assert {place: len(tokens) for place, tokens in ours.items()} == {p: len(tokens) for p, tokens in theirs.items()}
    assert all(set(ours[1, row]) <= set(ours[0, row]) for row in range(len(ROWS)))
    assert ours != theirs


def test_draws_differ_between_pictures_and_seeds_and_repeat_otherwise() -> None:
    row = tiny.row(2, 1, 4)
    drop = RandomDrop((0,), (0.5,))
    one, again, other = (kept(drop, tiny.llava_batch([row], seed=seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert kept(RandomDrop((0,), (0.5,), seed=1), tiny.llava_batch([row])) != one
    both = kept(drop, tiny.llava_batch([row, row]))
    assert both[0, 0] == one[0, 0] and both[0, 1] != one[0, 0]


def test_every_patch_is_kept_equally_often() -> None:
    drawn = kept(RandomDrop((0,), (0.25,)), tiny.llava_batch([tiny.row(2, 1, 4)] * 400))
    places = torch.tensor([place for row in drawn.values() for place in row])
    counts = torch.bincount(places)[2:18]  # without the text around the picture
    assert counts.sum() == 400 * 4
    # 100 each; four standard deviations of a binomial draw.
    assert (counts - 100).abs().max() < 4 * (400 * 0.25 * 0.75) ** 0.5


def test_before_the_decoder_no_layer_sees_what_was_dropped() -> None:
    model = tiny.llava()
    with pruneops.prune(model, RandomDrop((0,), (0.25,))) as run, torch.no_grad():
        model(**tiny.llava_batch(ROWS))
    assert run.layer_lengths == [[12, 15, 10, 11]] * tiny.LAYERS
    assert run.report().flops < run.report().dense_flops


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: got -1, expected 0 to"),
        ({"seed": 0.5}, TypeError, "seed: got 0.5"),
        ({"layers": (-1,), "keep_ratios": (0.5,)}, ValueError, "numbers of at least 0"),
        ({"layers": (1, 1), "keep_ratios": (0.5, 0.5)}, ValueError, "strictly increasing"),
        ({"keep_ratios": (0.5, 0.6)}, ValueError, "ratios that do not increase"),
    ],
)
def test_a_random_drop_that_cannot_be(fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RandomDrop(**fields)


# -- AveragePool -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 2), (4, 4), (3, 3)])
def test_the_decoder_sees_the_means_of_neighbouring_patches(rows: int, columns: int) -> None:
    model = tiny.llava()
    inputs = tiny.llava_batch([tiny.row(3, 1, 5)])
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    model(**inputs)
    with pruneops.prune(model, AveragePool(rows, columns)):
        model(**inputs)
    dense, pooled = seen
    grid = dense[3:19].T.view(1, -1, 4, 4)
    expected = torch.nn.functional.avg_pool2d(grid, (rows, columns), ceil_mode=True)[0].flatten(1).T
    torch.testing.assert_close(pooled, torch.cat([dense[:3], expected, dense[19:]]))


def test_one_patch_a_mean_is_the_dense_model() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS)
    dense = tiny.generated(model, batch, max_new_tokens=5)
    with pruneops.prune(model, AveragePool(1, 1)):
        assert tiny.generated(model, batch, max_new_tokens=5) == dense


def test_an_image_that_is_no_square_grid_is_refused() -> None:
    model = tiny.language_model()
    ids = torch.tensor([tiny.row(3, 1, 5)])
    visual = torch.zeros_like(ids, dtype=torch.bool)
    visual[:, 3:15] = True
    with pruneops.prune(model, AveragePool()), pytest.raises(ValueError, match="an image of 12 tokens, expected a sq"):
        model(input_ids=ids, visual_token_mask=visual)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_pool_that_cannot_be(size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="columns: got"):
        AveragePool(2, size)
