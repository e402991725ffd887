"""PruneVid reproduces what the official implementation computed: segments, merged tokens, kept tokens, decoding."""

from __future__ import annotations

import dataclasses
from itertools import groupby

import numpy as np
import pytest
import torch
from golden_support import GOLDENS, Golden, llama_model

import pruneops
from pruneops import backends
from pruneops.methods import PruneVid
from pruneops.methods.prunevid import merge_video
from pruneops.methods.video_merge import refined_labels
from pruneops.ragged import pack

MERGES = sorted(path.stem for path in GOLDENS.glob("prunevid_merge_*.npz"))
WHOLE = sorted(path.stem for path in GOLDENS.glob("prunevid_full_*.npz"))


def test_labels_are_refined_as_officially() -> None:
    golden = Golden("prunevid_refine")
    cases = (golden[key] for key in ("lens", "labels", "refined", "segment_lengths"))
    for n, labels, refined, lengths in zip(*cases, strict=True):
        ours = refined_labels(labels[:n].tolist())
        assert ours == refined[:n].tolist()
        assert [len(list(run)) for _, run in groupby(ours)] == [m for m in lengths.tolist() if m]


@pytest.mark.parametrize("name", MERGES)
def test_merged_videos_equal_the_official_ones(name: str) -> None:
    golden = Golden(name)
    config = golden.config
    frames = golden.tensor("frames")[0].view(config["num_frames"], -1, config["C"])
    options = {key: config[key] for key in ("tau", "temporal_segment_ratio", "cluster_ratio", "k")}
    for noise in (golden.tensor("noise_concat"), None):
        with backends.record_calls() as calls:
            merged = merge_video(frames, **options, noise=noise)
        assert set(calls) and all(backend == "native" for _, backend in calls)
        for key in ("window_sizes", "static_sizes", "dynamic_sizes"):
            assert getattr(merged, key) == golden[key].tolist()
        assert [static.int().tolist() for static in merged.static] == golden["static_mask_per_window"].tolist()
        np.testing.assert_allclose(merged.tokens.numpy(), golden["merged"][0], atol=1e-6)


def test_every_block_keeps_the_officially_selected_tokens() -> None:
    golden = Golden("prunevid_select_a")
    scores = golden.tensor("attn_text_to_image").amax((1, 2))[0]
    np.testing.assert_array_equal(scores.numpy(), golden["score"])
    blocks: list[int] = []
    sizes = (golden[f"{key}_sizes"].tolist() for key in ("window", "static", "dynamic"))
    for window, static, dynamic in zip(*sizes, strict=True):
        blocks += [static] + [dynamic // window] * window
    n = sum(blocks)
    alpha = golden.config["alpha"]
    batch = pack(torch.zeros(1, n, 1), None, None, torch.ones(1, n, dtype=torch.int64), None)
    (span,) = batch.spans[0]
    batch = dataclasses.replace(batch, spans=[[dataclasses.replace(span, blocks=tuple(blocks))]])
    kept = batch.keep_best_of_blocks(scores, [[tuple(int(m * alpha) for m in blocks)]])
    assert kept.origin.tolist() == golden["kept_sorted"].tolist()


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_whole_models_equal_the_official_ones_while_reading_and_while_decoding(name: str) -> None:
    golden = Golden(name)
    config = golden.config
    model = llama_model(config).eval()
    method = PruneVid(
        **{key: config[key] for key in ("tau", "temporal_segment_ratio", "cluster_ratio", "alpha", "selected_layer")}
    )
    input_ids, features = golden.tensor("input_ids"), golden.tensor("pooled_features")
    place = int((input_ids[0] == config["image_token_index"]).nonzero())
    text = model.model.embed_tokens(input_ids.clamp(max=config["vocab"] - 1))
    embeds = torch.cat([text[:, :place], features, text[:, place + 1 :]], 1)
    columns = torch.arange(embeds.shape[1])
    visual = (columns >= place) & (columns < place + features.shape[1])

    with pruneops.prune(model, method, record=True) as run, backends.record_calls() as calls:
        outputs = model(
            inputs_embeds=embeds,
            visual_token_mask=visual[None],
            num_frames=torch.tensor([config["num_frames"]]),
            use_cache=True,
        )
        assert set(calls) and all(backend == "native" for _, backend in calls)
        merge, selection = run.records
        (layout,) = merge.videos
        assert layout.window_sizes == golden["window_sizes"].tolist()
        kept = [merge.kept_positions.tolist().index(p) for p in selection.kept_positions.tolist()]
        assert kept == golden["pos_after_select"][0].tolist()
        in_video = [p - place for p in kept if place <= p < place + sum(layout.blocks)]
        assert in_video == golden["kept_image_rel_sorted"].tolist()
        # The official scores are themselves 1.4e-6 away from those of float64 arithmetic.
        np.testing.assert_allclose(selection.scores.numpy(), golden["score"], atol=2e-6)
        logits = outputs.logits[0, selection.kept_positions]
        np.testing.assert_allclose(logits.numpy(), golden["logits"][0], atol=1e-4)

        cache = outputs.past_key_values
        layers = range(config["layers"])
        assert [cache.lengths(i) for i in layers] == [[n] for n in golden["kv_len_prefill"].tolist()]
        keys = cache.layers[0].keys[0, : cache.lengths(0)[0]].transpose(0, 1)
        np.testing.assert_allclose(keys.numpy(), golden["kv_key_layer0"][0], atol=1e-5)

        # Decoding is fed the recorded tokens; the greedy choice has to be the next of them.
        decode = golden["decode_tokens"].tolist()
        for step, token in enumerate(decode):
            assert [cache.next_positions(i)[0] for i in layers] == golden["decode_pos_per_layer"][step].tolist()
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            np.testing.assert_allclose(logits.numpy(), golden["decode_logits"][step], atol=1e-4)
            if step + 1 < len(decode):
                assert int(logits.argmax()) == decode[step + 1]
        assert [cache.lengths(i) for i in layers] == [[n] for n in golden["kv_len_after_decode"].tolist()]
