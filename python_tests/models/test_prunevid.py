"""PruneVid on whole models: what is merged and kept, for whom, and that every way of running agrees."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import pruneops
from pruneops import backends, reference
from pruneops.methods import PruneVid, PyramidDrop
from pruneops.methods.prunevid import MergeRecord, merge_video
from pruneops.methods.video_merge import refined_labels

METHOD = PruneVid(tau=0.5, selected_layer=2)


@dataclass(frozen=True)
class Row:
    """Embeddings of one row ``(length, hidden)``, its visual numbers and the frames of its videos."""

    embeds: Tensor
    visual: Tensor
    frames: list[int]


def video(frames: int, patches: int, seed: int, channels: int = tiny.TEXT["hidden_size"]) -> Tensor:
    """``(frames, patches, channels)``: a few scenes, in which some patches stand still and others do not."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(1 + frames // 4, patches, channels, generator=generator)
    moving = torch.rand(patches, generator=generator) < 0.6
    noise = torch.randn(frames, patches, channels, generator=generator)
    noise *= torch.where(moving, 1.0, 0.1)[:, None]
    return 0.5 * (scenes[torch.arange(frames) // 4] + noise)


def row(*pieces: int | tuple[int, int], seed: int = 0) -> Row:
    """Text of n tokens for a number, a video for (frames, patches)."""
    generator = torch.Generator().manual_seed(100 + seed)
    embeds, visual, frames = [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            embeds.append(0.5 * torch.randn(piece, tiny.TEXT["hidden_size"], generator=generator))
            visual += [0] * piece
        else:
            frames.append(piece[0])
            embeds.append(video(*piece, seed=seed + len(frames)).flatten(0, 1))
            visual += [len(frames)] * (piece[0] * piece[1])
    return Row(torch.cat(embeds), torch.tensor(visual), frames)


ROWS = [
    row(4, (8, 18), 6, seed=1),
    row(3, (3, 16), 5, seed=2),  # fewer frames than neighbours
    row(9, seed=3),  # text only
    row(2, (8, 9), (1, 25), 3, (5, 20), 7, seed=4),  # two videos and an image, two of them side by side
]


def batch_of(rows: list[Row], side: str = "left") -> dict[str, Tensor]:
    longest = max(r.embeds.shape[0] for r in rows)

    def padded(x: Tensor) -> Tensor:
        fill = x.new_zeros(longest - x.shape[0], *x.shape[1:])
        return torch.cat([fill, x] if side == "left" else [x, fill])

    batch = {
        "inputs_embeds": torch.stack([padded(r.embeds) for r in rows]),
        "attention_mask": torch.stack([padded(torch.ones_like(r.visual)) for r in rows]),
        "visual_token_mask": torch.stack([padded(r.visual) for r in rows]),
    }
    frames = [n for r in rows for n in r.frames]
    return batch | ({"num_frames": torch.tensor(frames)} if frames else {})


def naive_merge(frames: Tensor, method: PruneVid) -> tuple[Tensor, list[int]]:
    """Merged tokens and block sizes of one video, frame by frame in plain torch, as the definition reads."""

    def cluster(x: Tensor, count: int) -> Tensor:
        found = reference.dpc_knn(x, torch.tensor([0, len(x)], dtype=torch.int32), [count], k=7)
        return found.cluster_ids

    def merged(block: Tensor) -> Tensor:
        if len(block) <= 14:
            return block
        ids = cluster(block, int(len(block) * method.cluster_ratio))
        return torch.stack([block[ids == c].mean(0) for c in range(int(ids.max()) + 1)])

    labels = cluster(frames.mean(1), max(1, int(len(frames) * method.temporal_segment_ratio)))
    labels = refined_labels(labels.tolist())
    blocks, start = [], 0
    for stop in range(1, len(frames) + 1):
        if stop < len(frames) and labels[stop] == labels[start]:
            continue
        segment = frames[start:stop]
        unit = nn.functional.normalize(segment, dim=-1)
        pairs = torch.einsum("ipc,jpc->pij", unit, unit)
        w = stop - start
        similarity = (pairs.sum((1, 2)) - w) / (w * (w - 1)) if w > 1 else torch.full((frames.shape[1],), -1.0)
        static = similarity > method.tau
        blocks.append(merged(segment[:, static].mean(0)))
        blocks += [merged(frame[~static]) for frame in segment]
        start = stop
    return torch.cat(blocks), [len(b) for b in blocks]


@torch.no_grad()
def naive_prunevid(model: nn.Module, r: Row, method: PruneVid) -> tuple[Tensor, Tensor]:
    """Last logits of one row and the tokens kept of the merged sequence, computed with the stock layers."""
    tokens, visual, blocks, at = [], [], [], 0
    number = 0
    while at < len(r.visual):
        stop = at
        while stop < len(r.visual) and r.visual[stop] == r.visual[at]:
            stop += 1
        piece = r.embeds[at:stop]
        if r.visual[at]:
            piece, sizes = naive_merge(piece.view(r.frames[number], -1, piece.shape[-1]), method)
            number += 1
            for size in sizes:
                blocks.append(range(len(visual), len(visual) + size))
                visual += [True] * size
        else:
            visual += [False] * len(piece)
        tokens.append(piece)
        at = stop
    hidden = torch.cat(tokens)[None]
    positions = torch.arange(hidden.shape[1])[None]
    keep = torch.arange(hidden.shape[1])
    for i, layer in enumerate(model.model.layers):
        causal = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        rotary = model.model.rotary_emb(hidden, positions)
        entering = hidden
        hidden = layer(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
        if i == method.selected_layer and blocks:
            attention, x = layer.self_attn, layer.input_layernorm(entering)[0]
            q = attention.q_proj(x).view(len(x), -1, attention.head_dim).transpose(0, 1)
            k = attention.k_proj(x).view(len(x), -1, attention.head_dim).transpose(0, 1)
            k = k.repeat_interleave(len(q) // len(k), 0)
            weights = (q @ k.transpose(1, 2) * attention.scaling).softmax(-1)
            scores = weights[:, max(j for block in blocks for j in block) + 1 :].amax((0, 1))
            text = [j for j, is_visual in enumerate(visual) if not is_visual]
            best = [
                block.start + j
                for block in blocks
                for j in scores[block.start : block.stop].topk(int(len(block) * method.alpha)).indices.tolist()
            ]
            keep = torch.tensor(sorted(text + best))
            hidden, positions = hidden[:, keep], positions[:, keep]
    return model.lm_head(model.model.norm(hidden[:, -1]))[0], keep


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_row_of_a_batch_equals_the_definition_in_plain_torch(kv_heads: int) -> None:
    model = tiny.language_model(num_key_value_heads=kv_heads, attn_implementation="eager")
    batch = batch_of(ROWS)
    with pruneops.prune(model, METHOD, record=True) as run, backends.record_calls() as calls:
        logits = model(**batch).logits
    assert {backend for _, backend in calls} == {"native"}
    for b, r in enumerate(ROWS):
        expected, keep = naive_prunevid(model, r, METHOD)
        torch.testing.assert_close(logits[b, -1], expected, atol=1e-4, rtol=1e-4)
        assert run.layer_lengths[-1][b] == len(keep)
        if r.frames:
            merged = next(rec for rec in run.records if rec.stage == 0 and rec.row == b).kept_positions
            selected = next(rec for rec in run.records if rec.stage == 1 and rec.row == b).kept_positions
            assert selected.tolist() == merged[keep].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_generates_what_its_rows_generate_alone(side: str) -> None:
    model = tiny.language_model()
    with pruneops.prune(model, METHOD):
        together = model.generate(**batch_of(ROWS, side), max_new_tokens=6)
        alone = [model.generate(**batch_of([r]), max_new_tokens=6)[0].tolist() for r in ROWS]
    assert together.tolist() == alone


def test_beams_of_rows_with_different_frames_equal_those_of_the_rows_alone() -> None:
    model = tiny.language_model()
    options = {"max_new_tokens": 5, "num_beams": 3}
    with pruneops.prune(model, METHOD):
        together = model.generate(**batch_of(ROWS), **options)
        alone = [model.generate(**batch_of([r]), **options)[0].tolist() for r in ROWS]
    assert together.tolist() == alone


@torch.no_grad()
def test_all_layers_cache_the_selected_tokens_only_and_positions_go_on_from_the_merged_length() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, METHOD, record=True) as run:
        cache = model(**batch_of(ROWS), use_cache=True).past_key_values
        merged, selected = run.layer_lengths[0], run.layer_lengths[-1]
        assert run.layer_lengths == [merged] * 3 + [selected] * 3
        assert all(s < m for r, m, s in zip(ROWS, merged, selected, strict=True) if r.frames)
        for i in range(tiny.LAYERS):
            assert cache.lengths(i) == selected
            assert cache.next_positions(i) == merged
        # Slots of the dropped tokens are given back, not only hidden.
        assert cache.layers[0].keys.shape == cache.layers[-1].keys.shape
        model(input_ids=torch.full((len(ROWS), 1), 5), past_key_values=cache)
        assert cache.lengths(0) == cache.lengths(5) == [n + 1 for n in selected]
        assert cache.next_positions(5) == [n + 1 for n in merged]


@torch.no_grad()
def test_the_compacted_cache_holds_the_keys_of_the_tokens_that_stay() -> None:
    model = tiny.language_model()
    batch = batch_of(ROWS)
    everything = PruneVid(tau=METHOD.tau, selected_layer=METHOD.selected_layer, alpha=1.0)
    with pruneops.prune(model, everything, record=True) as run:
        whole = model(**batch, use_cache=True).past_key_values
        merged = {r.row: r.kept_positions.tolist() for r in run.records if r.stage == 0}
    with pruneops.prune(model, METHOD, record=True) as run:
        cut = model(**batch, use_cache=True).past_key_values
        kept = {r.row: r.kept_positions.tolist() for r in run.records if r.stage == 1}
    for b in range(len(ROWS)):
        places = [merged[b].index(p) for p in kept[b]]
        for i in range(METHOD.selected_layer + 1):
            for name in ("keys", "values"):
                expected = getattr(whole.layers[i], name)[b, places]
                assert torch.equal(getattr(cut.layers[i], name)[b, : len(places)], expected)


@torch.no_grad()
@pytest.mark.parametrize("earlier", [[row(5), row(8, seed=9)], [row(3, (4, 16), 2, seed=7), row(6, (8, 9), 4, seed=8)]])
def test_a_further_turn_is_pruned_by_itself_and_leaves_earlier_turns_alone(earlier: list[Row]) -> None:
    model = tiny.language_model()
    turn = [row(2, (8, 18), 4, seed=5), row(3, (5, 16), 3, seed=6)]
    with pruneops.prune(model, METHOD):
        cache = DynamicCache()
        model(**batch_of(earlier), past_key_values=cache)
        before = [cache.lengths(i) for i in range(tiny.LAYERS)]
        positions = cache.next_positions(0)
        first = [cache.layers[0].keys[b, : before[0][b]].clone() for b in range(2)]
        second = batch_of(turn)
        second["attention_mask"] = torch.cat([batch_of(earlier)["attention_mask"], second["attention_mask"]], 1)
        logits = model(**second, past_key_values=cache).logits[:, -1]
        after = [cache.lengths(i) for i in range(tiny.LAYERS)]
        for b in range(2):
            assert torch.equal(cache.layers[0].keys[b, : before[0][b]], first[b])
            # All layers have dropped the same tokens of the turn.
            assert len({after[i][b] - before[i][b] for i in range(tiny.LAYERS)}) == 1
            alone = DynamicCache()
            model(**batch_of([earlier[b]]), past_key_values=alone)
            expected = model(**batch_of([turn[b]]), past_key_values=alone).logits[0, -1]
            torch.testing.assert_close(logits[b], expected, atol=1e-5, rtol=1e-4)
            assert alone.lengths(3) == [after[3][b]]
            assert alone.next_positions(3) == [cache.next_positions(3)[b]]
        assert all(n > p for n, p in zip(cache.next_positions(0), positions, strict=True))


@torch.no_grad()
def test_text_inside_a_video_stays_and_follows_its_merged_tokens() -> None:
    model = tiny.language_model()
    plain = row(3, (4, 16), 5, seed=1)
    newlines = 0.5 * torch.randn(3, tiny.TEXT["hidden_size"], generator=torch.Generator().manual_seed(7))
    embeds, visual, moved = [plain.embeds[:3]], [0] * 3, [plain.embeds[: 3 + 64]]
    for frame in range(4):
        embeds.append(plain.embeds[3 + 16 * frame : 3 + 16 * (frame + 1)])
        visual += [1] * 16
        if frame < 3:
            embeds.append(newlines[frame : frame + 1])
            visual.append(0)
    embeds.append(plain.embeds[67:])
    moved += [newlines, plain.embeds[67:]]
    inside = Row(torch.cat(embeds), torch.tensor(visual + [0] * 5), [4])
    behind = Row(torch.cat(moved), torch.tensor([0] * 3 + [1] * 64 + [0] * 8), [4])
    with pruneops.prune(model, METHOD) as run:
        got = model(**batch_of([inside])).logits[0, -1]
        lengths = run.layer_lengths
        expected = model(**batch_of([behind])).logits[0, -1]
        assert run.layer_lengths == lengths
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_row_without_text_behind_its_videos_is_merged_but_not_selected_from() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, METHOD) as run:
        model(**batch_of([row(4, (8, 18), seed=1), row(4, (8, 18), 3, seed=1)]))
    assert run.layer_lengths[0][0] == run.layer_lengths[-1][0]
    assert run.layer_lengths[0][1] > run.layer_lengths[-1][1]
    assert run.layer_lengths[0][0] < 4 + 8 * 18


@torch.no_grad()
def test_an_alpha_of_zero_makes_the_videos_vanish() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, PruneVid(alpha=0.0, selected_layer=1)) as run:
        model(**batch_of(ROWS))
    assert run.layer_lengths[-1] == [int((r.visual == 0).sum()) for r in ROWS]


@torch.no_grad()
def test_a_method_that_selects_behind_the_last_layer_shortens_the_cache_only() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, PruneVid(selected_layer=tiny.LAYERS - 1)) as run:
        cache = model(**batch_of(ROWS[:1]), use_cache=True).past_key_values
    assert run.layer_lengths[-1] == run.layer_lengths[0] > cache.lengths(0)


def test_a_training_step_has_the_gradients_of_the_merged_sequence_with_and_without_checkpointing() -> None:
    model = tiny.language_model().train()
    batch = batch_of(ROWS)
    embeds = batch["inputs_embeds"].requires_grad_()
    labels = torch.full(batch["attention_mask"].shape, -100)
    labels[:, -3:] = torch.tensor([7, 8, 9])
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        embeds.grad = None
        with pruneops.prune(model, METHOD):
            loss = model(**batch, labels=labels).loss
            loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), embeds.grad.clone(), *gradients])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    # Every token of every video has a part in some mean.
    visual = batch["visual_token_mask"] > 0
    assert bool((results[0][1][visual].abs().sum(-1) > 0).all())


@torch.no_grad()
def test_the_text_behind_the_last_video_asks_but_no_answer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, *args: object, **kwargs: object) -> Tensor:
        asked.append(cu_seqlens_q.diff().tolist())
        return stock(q, k, cu_seqlens_q, *args, **kwargs)

    stock = pruneops.ops.last_query_scores
    monkeypatch.setattr(pruneops.ops, "last_query_scores", spy)
    model = tiny.language_model().train()
    batch = batch_of(ROWS)
    labels = torch.full(batch["attention_mask"].shape, -100)
    labels[:, -2:] = 5
    with pruneops.prune(model, METHOD):
        model(**batch)
        model(**batch, labels=labels)
    assert asked == [[6, 5, 0, 7], [4, 3, 0, 5]]


def test_the_token_before_an_answer_is_the_last_merged_token() -> None:
    model = tiny.language_model()
    r = row(4, (4, 18), 2, seed=3)
    labels = torch.full((1, len(r.visual)), -100)
    labels[0, -2:] = torch.tensor([7, 8])  # the first answer token stands right behind the video
    with torch.no_grad(), pruneops.prune(model, METHOD, record=True) as run:
        outputs = model(**batch_of([r]), labels=labels.clone())
        merged, _ = naive_merge(r.embeds[4:-2].view(4, 18, -1), METHOD)
    sequence = torch.cat([r.embeds[:4], merged, r.embeds[-2:]])
    with torch.no_grad():
        logits = model(inputs_embeds=sequence[None]).logits[0]
    expected = nn.functional.cross_entropy(logits[-3:-1], torch.tensor([7, 8]))
    torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(run.records[0], MergeRecord)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [METHOD, PyramidDrop((2,), (1.0,)), PyramidDrop((2,), (0.5,))], ids=str)
def test_answers_right_behind_videos_give_padded_rows_the_loss_they_have_alone(side: str, method: object) -> None:
    model = tiny.language_model().train()
    rows = [row(4, (4, 18), 2, seed=1), row(9, (3, 9), 5, seed=2), row(2, (5, 20), seed=3)]
    losses = []
    with pruneops.prune(model, method):
        for chosen in (rows, *([r] for r in rows)):
            batch = batch_of(chosen, side)
            visual = batch["visual_token_mask"] > 0
            # Nothing predicts the first token of a row.
            mask = batch["attention_mask"]
            labels = torch.where(visual | (mask == 0) | (mask.cumsum(1) == 1), -100, 7)
            logits = model(**batch, labels=labels).logits[:, :-1]
            token_losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            losses += [loss[loss > 0] for loss in token_losses]
    for together, alone in zip(losses[:3], losses[3:], strict=True):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_answer_right_behind_a_video_has_nobody_ask_and_later_answers_do_not_ask_either() -> None:
    model = tiny.language_model().train()
    r = row(4, (4, 18), 8, seed=3)
    labels = torch.full((1, len(r.visual)), -100)
    labels[0, -8:-5], labels[0, -2:] = 7, 8  # two answers, the first right behind the video
    with pruneops.prune(model, METHOD) as run:
        model(**batch_of([r]), labels=labels)
    assert run.layer_lengths[0] == run.layer_lengths[-1]


@torch.no_grad()
def test_an_empty_row_changes_nothing_for_the_others() -> None:
    model = tiny.language_model()
    batch = batch_of([ROWS[0], row(6, seed=9)])
    batch["attention_mask"][1] = 0
    with pruneops.prune(model, METHOD) as run:
        logits = model(**batch).logits[0, -1]
        assert [lengths[1] for lengths in run.layer_lengths] == [0] * tiny.LAYERS
        torch.testing.assert_close(logits, model(**batch_of(ROWS[:1])).logits[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("ends_in_video", [True, False])
@pytest.mark.parametrize("method", [METHOD, PruneVid(tau=1.0, cluster_ratio=1.0, alpha=1.0, selected_layer=2)], ids=str)
def test_a_row_alone_has_the_logits_that_it_has_beside_a_longer_one(method: PruneVid, ends_in_video: bool) -> None:
    model = tiny.language_model()
    r = row(3, (4, 12), 0 if ends_in_video else 5, seed=1)
    visual = r.visual.clone()
    visual[[15, 28]] = 0  # text between the pieces of the video
    short = Row(torch.cat([r.embeds[:3], r.embeds[3:51], r.embeds[51:]]), visual, [2])
    with pruneops.prune(model, method):
        alone = model(**batch_of([short])).logits[0]
        batch = model(**batch_of([short, row(70, seed=5)], "left")).logits[0, -len(visual) :]
    torch.testing.assert_close(alone, batch, atol=1e-5, rtol=1e-4)
    assert bool(alone[-1].any())


def test_gradients_of_the_frames_are_those_of_the_definition() -> None:
    frames = video(8, 18, seed=1).requires_grad_()
    weights = torch.randn(1000, frames.shape[-1], generator=torch.Generator().manual_seed(2))
    gradients = []
    for tokens in (merge(frames, METHOD.tau).tokens, naive_merge(frames, METHOD)[0]):
        (gradient,) = torch.autograd.grad((tokens * weights[: len(tokens)]).sum(), frames)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_generating_reads_the_frame_counts_of_the_prompt_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    stock = pruneops.stand_ins._frames
    monkeypatch.setattr(pruneops.stand_ins, "_frames", lambda frames: reads.append(frames) or stock(frames))
    model = tiny.language_model()
    with pruneops.prune(model, METHOD):
        model.generate(**batch_of(ROWS), max_new_tokens=8)
    assert len(reads) == 2  # to lay them out by row, and in the prompt


@torch.no_grad()
def test_a_further_turn_may_come_with_the_mask_and_the_frames_of_all_turns() -> None:
    model = tiny.language_model()
    first, second = [row(3, (4, 16), 4, seed=1)], [row(2, (8, 9), 3, seed=2)]
    whole = {
        key: torch.cat([batch_of(first)[key], batch_of(second)[key]], dim=1)
        for key in ("attention_mask", "visual_token_mask")
    }
    whole["visual_token_mask"][:, len(first[0].visual) :] *= 2
    logits = []
    with pruneops.prune(model, METHOD):
        for masks in ({**whole, "num_frames": [4, 8]}, {**batch_of(second), "attention_mask": whole["attention_mask"]}):
            cache = DynamicCache()
            model(**batch_of(first), past_key_values=cache)
            turn = {**batch_of(second), **masks}
            logits.append(model(**turn, past_key_values=cache).logits[0, -1])
    assert torch.equal(*logits)


@torch.no_grad()
def test_merging_takes_as_many_op_calls_for_one_small_video_as_for_a_batch_of_long_ones() -> None:
    model = tiny.language_model()
    counts = []
    for rows in ([row(3, (4, 16), 5)], [row(3, (16, 36), 5, seed=b) for b in range(4)]):
        with pruneops.prune(model, METHOD), backends.record_calls() as calls:
            model(**batch_of(rows))
        counts.append({op: n for (op, _), n in calls.items() if op != "gather_rows"})
    assert counts[0] == counts[1]
    assert counts[0]["dpc_knn"] == 2
    assert counts[0]["merge_mean"] == 2
    assert counts[0]["position_means"] == 1


@torch.no_grad()
def test_the_records_say_where_every_token_came_from() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, METHOD, record=True) as run:
        model(**batch_of(ROWS))
    merges = {r.row: r for r in run.records if isinstance(r, MergeRecord)}
    assert sorted(merges) == [0, 1, 2, 3]
    assert [len(merges[b].videos) for b in range(4)] == [len(r.frames) for r in ROWS]
    for b, r in enumerate(ROWS):
        positions = merges[b].kept_positions
        assert len(set(positions.tolist())) == len(positions) == run.layer_lengths[0][b]
        for layout in merges[b].videos:
            places = (r.visual == layout.image).nonzero().squeeze(1)
            assert layout.first_token == int(places[0])
            assert layout.num_frames * layout.patches == len(places)
            assert sum(layout.window_sizes) == layout.num_frames
            assert len(layout.blocks) == layout.num_frames + len(layout.window_sizes)
            assert sum(layout.blocks) == len(layout.tokens)
            assert set((layout.first_token + layout.tokens).tolist()) <= set(positions.tolist())
            # A static token stands in the first frame of its segment, at a static position.
            frame, at = 0, 0
            for window, static in zip(layout.window_sizes, layout.static, strict=True):
                size = layout.blocks[at]
                start = sum(layout.blocks[:at])
                for token in layout.tokens[start : start + size].tolist():
                    assert token // layout.patches == frame
                    assert bool(static[token % layout.patches])
                at += 1 + window
                frame += window


def test_the_context_leaves_the_model_as_it_was() -> None:
    model = tiny.language_model()
    batch = batch_of(ROWS)
    with torch.no_grad():
        before = model(inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"]).logits
        with pruneops.prune(model, METHOD):
            model(**batch)
        after = model(inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_an_error_within_the_selected_layer_leaves_no_hook_behind() -> None:
    model = tiny.language_model()
    broken = model.model.layers[METHOD.selected_layer].self_attn.o_proj
    weight = broken.weight
    broken.weight = nn.Parameter(torch.zeros(3, 3))
    with pruneops.prune(model, METHOD), pytest.raises(RuntimeError):
        model(**batch_of(ROWS))
    broken.weight = weight
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("frames", "error", "match"),
    [
        ([8], ValueError, "got 1 entries, expected 2"),
        ([8, 3, 1], ValueError, "got 3 entries, expected 2"),
        ([7, 3], ValueError, "got 7 for video 0, expected a divisor of its 144 visual tokens"),
        ([8, 0], ValueError, "got 0 for video 1"),
        ([8, -3], ValueError, "got -3 for video 1"),
        (torch.tensor([8.0, 3.0]), TypeError, "got torch.float32, expected integers"),
        (torch.tensor(8), ValueError, r"got shape \(\), expected"),
        ("83", TypeError, "expected a 1-D int tensor or a list of ints"),
    ],
)
def test_frame_counts_that_do_not_fit_are_refused(frames: object, error: type[Exception], match: str) -> None:
    model = tiny.language_model()
    batch = batch_of(ROWS[:2]) | {"num_frames": frames}
    with pruneops.prune(model, METHOD), pytest.raises(error, match=match):
        model(**batch)


@torch.no_grad()
def test_frame_counts_may_be_a_list_and_other_methods_do_not_mind_them() -> None:
    model = tiny.language_model()
    batch = batch_of(ROWS)
    with pruneops.prune(model, METHOD):
        expected = model(**batch).logits
        assert torch.equal(model(**{**batch, "num_frames": batch["num_frames"].tolist()}).logits, expected)
    with pruneops.prune(model, PyramidDrop((2,), (0.5,))):
        with_frames = model(**batch).logits
        assert torch.equal(model(**{k: v for k, v in batch.items() if k != "num_frames"}).logits, with_frames)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"tau": float("nan")}, ValueError, "tau: got nan, expected a finite number"),
        ({"tau": "high"}, TypeError, "tau: got 'high'"),
        ({"temporal_segment_ratio": 0.0}, ValueError, r"temporal_segment_ratio: got 0.0, expected a share in \(0, 1\]"),
        ({"cluster_ratio": 1.5}, ValueError, "cluster_ratio: got 1.5"),
        ({"alpha": -0.1}, ValueError, r"alpha: got -0.1, expected a share in \[0, 1\]"),
        ({"alpha": True}, TypeError, "alpha: got True"),
        ({"selected_layer": -1}, ValueError, "selected_layer: got -1"),
        ({"selected_layer": 2.0}, TypeError, "selected_layer: got 2.0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        PruneVid(**fields)


def test_a_selected_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="selected_layer: got 10, expected at most 5: the model has 6 layers"):
        pruneops.prune(tiny.language_model(), PruneVid())


def test_the_method_lives_in_a_config() -> None:
    method = PruneVid(tau=0.7, selected_layer=5)
    assert pruneops.methods.method_from_dict(method.to_dict()) == method


# -- merge_video -------------------------------------------------------------------------------------------------------


def merge(frames: Tensor, tau: float = 0.8, **changes: float) -> object:
    ratios = {"temporal_segment_ratio": 0.25, "cluster_ratio": 0.5, **changes}
    return merge_video(frames, tau=tau, **ratios)


@pytest.mark.parametrize(("frames", "patches"), [(1, 1), (1, 40), (2, 16), (5, 9), (6, 30), (16, 36), (33, 20)])
def test_merge_video_equals_the_definition_in_plain_torch(frames: int, patches: int) -> None:
    x = video(frames, patches, seed=frames)
    tokens, blocks = naive_merge(x, METHOD)
    found = merge(x, METHOD.tau)
    assert found.blocks == blocks
    torch.testing.assert_close(found.tokens, tokens)
    assert sum(found.window_sizes) == frames
    assert sum(found.static_sizes) + sum(found.dynamic_sizes) == len(tokens)


def test_a_video_that_stands_still_becomes_one_segment_of_static_tokens() -> None:
    frame = torch.randn(1, 12, 8)
    found = merge(frame.expand(9, 12, 8))
    assert (found.window_sizes, found.static_sizes, found.dynamic_sizes) == ([9], [12], [0])
    torch.testing.assert_close(found.tokens, frame[0])


def test_a_single_frame_is_dynamic() -> None:
    found = merge(torch.randn(1, 30, 8), tau=-1.0)
    assert (found.window_sizes, found.static_sizes, found.dynamic_sizes) == ([1], [0], [15])


def test_blocks_of_14_tokens_stay_and_blocks_of_15_are_clustered() -> None:
    for patches, merged in ((14, 14), (15, 7)):
        x = torch.randn(1, patches, 8)
        found = merge(x)
        assert found.dynamic_sizes == [merged]
        if patches == merged:
            assert torch.equal(found.tokens, x[0])


def test_a_cluster_ratio_of_1_reorders_and_merges_nothing() -> None:
    x = torch.randn(1, 20, 8)
    found = merge(x, cluster_ratio=1.0)
    assert sorted(found.sources.tolist()) == list(range(20))
    assert torch.equal(found.tokens, x[0, found.sources])
    assert found.sources.tolist() != list(range(20))


def test_as_many_clusters_as_frames_make_one_segment() -> None:
    assert merge(torch.randn(8, 4, 8), temporal_segment_ratio=1.0).window_sizes == [8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merged_tokens_have_the_dtype_of_the_frames(dtype: torch.dtype) -> None:
    x = video(8, 18, seed=1).to(dtype)
    found = merge(x)
    wide = merge(x.double())
    assert found.tokens.dtype == dtype
    assert found.blocks == wide.blocks
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 0.0}[dtype]
    torch.testing.assert_close(found.tokens.double(), wide.tokens, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("frames", "noise", "error", "match"),
    [
        ([[1.0]], None, TypeError, "frames: got list"),
        (torch.randn(4, 8), None, ValueError, r"frames: got torch.float32 of shape \(4, 8\)"),
        (torch.randn(0, 4, 8), None, ValueError, "none of them 0"),
        (torch.ones(4, 4, 8, dtype=torch.int64), None, ValueError, "frames: got torch.int64"),
        (torch.randn(4, 4, 8), torch.rand(2), ValueError, "at least one for each frame"),
        (torch.randn(4, 4, 8), torch.rand(5), ValueError, "got 1 draws behind those of the frames, expected 0"),
        (torch.randn(1, 20, 8), torch.rand(20), ValueError, "got 19 draws behind those of the frames, expected 20"),
        (torch.randn(1, 20, 8), [0.5] * 21, TypeError, "noise: got list"),
    ],
)
def test_merge_video_refuses_what_is_no_video(
    frames: object, noise: object, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        merge_video(frames, tau=0.8, temporal_segment_ratio=0.25, cluster_ratio=0.5, noise=noise)


@pytest.mark.parametrize(
    ("setting", "value"), [("tau", float("nan")), ("cluster_ratio", 1.5), ("temporal_segment_ratio", 0.0)]
)
def test_merge_video_refuses_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}: got {value}, expected a "):
        merge_video(torch.randn(4, 4, 8), **{setting: value})


@pytest.mark.parametrize(
    ("labels", "refined"),
    [
        ([], []),
        ([3], [0]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([1, 1, 0, 2, 2, 2], [1, 1, 2, 2, 2, 2]),
        ([1, 1, 0, 2, 2], [1, 1, 1, 2, 2]),
        ([1, 1, 0, 1, 1], [1, 1, 1, 1, 1]),
        ([0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]),
        ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),
    ],
)
def test_labels_become_contiguous_runs(labels: list[int], refined: list[int]) -> None:
    assert refined_labels(labels) == refined


@torch.no_grad()
def test_the_report_counts_the_tokens_before_merging_as_dense_and_the_keys_that_stay() -> None:
    model = tiny.language_model()
    with pruneops.prune(model, METHOD) as run:
        cache = model(**batch_of(ROWS), use_cache=True).past_key_values
        report = run.report()
    assert report.dense_lengths == tuple(len(r.visual) for r in ROWS)
    assert report.kv_bytes == cache.nbytes()
    assert report.kv_ratio < report.flop_ratio < 1
