"""FLOPs, KV bytes, budgets and reports: numbers worked out by hand or taken from the literature."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pruneops.analysis import (
    TextShape,
    average_tokens,
    break_even_tokens,
    decode_flops,
    dtype_bytes,
    kv_bytes,
    kv_bytes_per_token,
    layer_flops,
    lm_head_flops,
    prefill_flops,
    pyramid_lengths,
    ranking_flops,
    solve_keep_ratios,
    solve_layers,
)
from pruneops.analysis.flops import causal_pairs
from pruneops.report import Report, compare

STAGES, RATIOS = (8, 16, 24), (0.5, 0.25, 0.125)


def vicuna_7b() -> SimpleNamespace:
    return SimpleNamespace(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
    )


def small_gqa() -> SimpleNamespace:
    return SimpleNamespace(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=11,
    )


def test_analysis_and_report_import_no_transformers() -> None:
    code = "import pruneops.analysis, pruneops.report, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layer_flops_count_every_matrix_of_a_grouped_query_layer() -> None:
    # q and o are 16 x 32, k and v 16 x 16, the MLP three times 16 x 24: 2688 weights.
    weights = 2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 24
    pairs = 1 + 2 + 3 + 4 + 5
    assert TextShape.from_config(small_gqa()).layer_weights == weights
    assert layer_flops(small_gqa(), 5) == 2 * weights * 5 + 2 * 2 * 4 * 8 * pairs


def test_layer_flops_with_a_cache_count_the_keys_of_earlier_tokens() -> None:
    config = small_gqa()
    assert layer_flops(config, 7) == layer_flops(config, 5) + layer_flops(config, 2, key_length=7)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (1, 1), (3, 3), (2, 6), (5, 3), (4, 0)])
def test_causal_pairs_equal_the_mask_count(queries: int, keys: int) -> None:
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert causal_pairs(queries, keys) == int(mask.sum())


def test_decode_flops_are_one_token_a_layer_plus_the_head() -> None:
    config = small_gqa()
    expected = 2 * layer_flops(config, 1, 9) + 2 * layer_flops(config, 1, 4) + lm_head_flops(config, 1)
    assert decode_flops(config, [[9], [9], [4], [4]]) == expected


@pytest.mark.parametrize(
    ("visual", "dense_tera", "pruned_tera", "ratio"), [(576, 8.4, 4.4, 0.520), (2880, 40.4, 19.1, 0.472)]
)
def test_pyramiddrop_flops_match_the_known_7b_numbers(
    visual: int, dense_tera: float, pruned_tera: float, ratio: float
) -> None:
    lengths = [[n] for n in pyramid_lengths(32, 64, visual, STAGES, RATIOS)]
    dense = prefill_flops(vicuna_7b(), [[64 + visual]] * 32, lm_head=False)
    pruned = prefill_flops(vicuna_7b(), lengths, lm_head=False)
    assert dense / 1e12 == pytest.approx(dense_tera, abs=0.06)
    assert pruned / 1e12 == pytest.approx(pruned_tera, abs=0.06)
    assert pruned / dense == pytest.approx(ratio, abs=0.002)


def test_paper_macs_of_visual_tokens_are_reproduced() -> None:
    # The paper counts multiply-adds of visual tokens with full, not causal, attention.
    def macs(n: int) -> int:
        return 4 * n * 4096**2 + 2 * n**2 * 4096 + 3 * n * 4096 * 11008

    shape = TextShape.from_config(vicuna_7b())
    lengths = pyramid_lengths(32, 0, 576, STAGES, RATIOS)
    ours = sum(shape.layer_weights * n + 2 * n * n * 4096 for n in lengths)
    assert ours == 8 * sum(macs(n) for n in (576, 288, 144, 72))
    assert ours / 1e12 == pytest.approx(1.78, abs=0.005)


def test_ranking_costs_below_one_percent_and_only_rows_that_shrank_pay() -> None:
    lengths = [[n, 40] for n in pyramid_lengths(32, 64, 576, STAGES, RATIOS)]
    plain = prefill_flops(vicuna_7b(), lengths)
    ranked = prefill_flops(vicuna_7b(), lengths, ranked_layers=STAGES)
    assert ranked - plain == sum(ranking_flops(vicuna_7b(), n) for n in (640, 352, 208))
    assert (ranked - plain) / plain < 0.01


def test_pyramid_lengths_truncate_the_share_of_the_original_count() -> None:
    assert pyramid_lengths(4, 10, 41, (1, 2, 3), RATIOS) == [51, 30, 20, 15]


def test_kv_bytes_follow_heads_dtype_and_lengths() -> None:
    assert kv_bytes_per_token(small_gqa(), torch.bfloat16) == 2 * 2 * 8 * 2
    assert kv_bytes(small_gqa(), [[3, 4], [3, 4], [1, 4], [1, 4]], torch.float32) == 2 * 2 * 8 * 4 * 24


@pytest.mark.parametrize(("dtype", "size"), [("torch.float32", 4), ("bfloat16", 2), (torch.float16, 2)])
def test_dtype_bytes_takes_dtypes_and_names(dtype: object, size: int) -> None:
    assert dtype_bytes(dtype) == size


def test_an_unknown_dtype_and_an_unknown_config_are_named() -> None:
    with pytest.raises(ValueError, match="dtype must be a floating point type.*'complex'"):
        dtype_bytes("complex")
    with pytest.raises(ValueError, match="text_config.hidden_size must be an integer, got None"):
        TextShape.from_config(SimpleNamespace())


def test_the_authors_recipe_for_64_tokens_is_found() -> None:
    ratios = solve_keep_ratios(63, 32, 576, (2, 8, 16))
    assert ratios[0] == pytest.approx(0.19, abs=0.002)
    assert ratios[1] == pytest.approx(ratios[0] ** 2)
    assert average_tokens(32, 576, (2, 8, 16), ratios) == pytest.approx(63, abs=0.1)


@pytest.mark.parametrize("target", [150.0, 270.0, 400.0, 575.0, 576.0])
def test_solved_keep_ratios_hit_the_target_to_a_token(target: float) -> None:
    ratios = solve_keep_ratios(target, 32, 576, STAGES)
    assert all(0 < ratio <= 1 for ratio in ratios)
    assert average_tokens(32, 576, STAGES, ratios) == pytest.approx(target, abs=1.0)


def test_a_target_out_of_reach_names_the_range() -> None:
    with pytest.raises(ValueError, match="target_average must lie between 144 .* and 576 .* got 100"):
        solve_keep_ratios(100, 32, 576, STAGES)


def test_solved_layers_hit_the_target_and_prefer_even_stages() -> None:
    assert solve_layers(270, 32, 576, RATIOS) == STAGES
    layers = solve_layers(192, 32, 576, RATIOS)
    assert average_tokens(32, 576, layers, RATIOS) == pytest.approx(192, rel=0.01)


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="layers must increase and lie in 1..7"):
        average_tokens(8, 576, (2, 8), (0.5, 0.25))


def test_break_even_grows_with_the_overhead() -> None:
    def first(overhead: float) -> int | None:
        return break_even_tokens(vicuna_7b(), STAGES, RATIOS, overhead_seconds=overhead, flops_per_second=7e14)

    small, large = first(1e-4), first(1e-2)
    assert small is not None and large is not None and small < large < 2000
    assert first(1e6) is None


def report(lengths: list[list[int]], seconds: list[float], **options: object) -> Report:
    return Report.from_run(
        layer_lengths=lengths, layer_seconds=seconds, text_config=small_gqa(), dtype=torch.float32, **options
    )


PRUNED = [[9, 5], [9, 5], [6, 5], [4, 5]]


def test_a_report_groups_layers_and_adds_up() -> None:
    run = report(PRUNED, [0.1, 0.2, 0.3, 0.4], ranked_layers=(2, 3))
    assert [(g.name, g.tokens) for g in run.groups()] == [("0-1", 14), ("2", 11), ("3", 9)]
    assert run.tokens == [14, 14, 11, 9]
    assert run.flops == prefill_flops(small_gqa(), PRUNED, ranked_layers=(2, 3))
    assert run.dense_flops == prefill_flops(small_gqa(), [[9, 5]] * 4)
    assert run.kv_bytes == kv_bytes(small_gqa(), PRUNED, torch.float32)
    assert run.seconds == pytest.approx(1.0)
    assert run.flop_ratio == run.flops / run.dense_flops < 1
    assert sum(g.flops for g in run.groups()) + run.lm_head_flops == run.flops
    text = str(run)
    assert "layers" in text and "of dense" in text and "1000.0" in text


def test_a_report_is_plain_data_for_json() -> None:
    run = report(PRUNED, [])
    values = json.loads(json.dumps(run.to_dict()))
    assert values["layer_lengths"] == PRUNED and values["seconds"] is None and values["rows"] == 2


def test_comparing_shows_dense_beside_pruned() -> None:
    dense, pruned = report([[9, 5]] * 4, [0.5] * 4), report(PRUNED, [0.1, 0.2, 0.3, 0.4])
    lines = compare(dense, pruned).splitlines()
    assert lines[3].split()[:3] == ["0-1", "14", "14"] and lines[5].split()[:3] == ["3", "14", "9"]
    assert lines[-2].split()[-2:] == ["2000.00", "1000.00"] and lines[-1].endswith("50.0 %")


def test_reports_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_lengths must have 4 entries \(layers\), got 2"):
        report(PRUNED[:2], [])
    with pytest.raises(ValueError, match="layer_seconds must be empty or have 4 entries, got 1"):
        report(PRUNED, [1.0])
    with pytest.raises(ValueError, match="runs of the same model on the same rows"):
        compare(report([[9]] * 4, []), report(PRUNED, []))
