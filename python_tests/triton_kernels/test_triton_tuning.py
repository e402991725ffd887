"""Tile sizes come from tables, are measured only on demand, and a table that is broken says so."""

from __future__ import annotations

import json

import pytest
import torch
import triton
import triton.language as tl

from pruneops.triton import TUNABLES, tune, tuning
from pruneops.triton.tuning import Config, Tunable

CPU = torch.device("cpu")
SMALL, LARGE, WRONG = (Config({"BLOCK": block}) for block in (16, 32, 64))


@triton.jit
def _double(x, out, total, wrong, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + rows, mask=rows < total) * tl.where(wrong != 0, 3.0, 2.0)
    tl.store(out + rows, values, mask=rows < total)


def problem(shape_class: str, device: torch.device):
    x = torch.randn(100, device=device)

    def call() -> torch.Tensor:
        config = tuning.configuration(DOUBLE, shape_class, device)
        out = torch.empty_like(x)
        block = config.blocks["BLOCK"]
        _double[(triton.cdiv(100, block),)](x, out, 100, int(config is WRONG), **config.options)
        return out

    return call


DOUBLE = Tunable("double", ("short", "long"), lambda shape_class: (SMALL, WRONG, LARGE), SMALL, problem)


@pytest.fixture(autouse=True)
def _own_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "device_class", lambda index: (90, "A GPU"))
    tuning.forget_tables()
    yield
    tuning.forget_tables()


def times(*milliseconds: float):
    """A clock that gives these times, one a measurement."""
    left = list(milliseconds)

    def measure(call) -> float:
        call()
        return left.pop(0)

    return measure


def run_tune(work, *milliseconds: float) -> list[tune.Outcome]:
    return list(tune.tune(work, CPU, tuning.user_table_path(), measure=times(*milliseconds)))


def looked_up(tunable: Tunable, shape_class: str, monkeypatch) -> Config:
    """What a compiled call would run with."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return tuning.configuration(tunable, shape_class, CPU)


def test_the_first_candidate_is_the_default(monkeypatch):
    assert looked_up(DOUBLE, "short", monkeypatch) is SMALL


def test_a_gpu_with_little_shared_memory_gets_the_last_candidate(monkeypatch):
    monkeypatch.setattr(tuning, "device_class", lambda index: (89, "A small GPU"))
    assert looked_up(DOUBLE, "short", monkeypatch) is LARGE


def test_candidates_of_newer_gpus_are_left_out_on_older_ones():
    newer = Config({"BLOCK": 128}, min_capability=90)
    tunable = Tunable("double", ("short",), lambda shape_class: (newer, SMALL), SMALL, problem)
    assert tunable.candidates_for("short", 80) == [SMALL]
    assert tunable.candidates_for("short", 90) == [newer, SMALL]


def test_the_fastest_candidate_that_is_right_is_kept_and_found_again(monkeypatch):
    work = tune.work_left([DOUBLE], "A GPU", {})
    assert [(tunable.name, shape_class) for tunable, shape_class in work] == [("double", "short"), ("double", "long")]
    short, long = run_tune(work, 2.0, 1.0, 1.0, 3.0)
    assert short.best == LARGE and (short.best_ms, short.default_ms) == (1.0, 2.0)
    assert long.best == SMALL
    assert "other results than the default" in short.refused[0]
    assert looked_up(DOUBLE, "short", monkeypatch).blocks == {"BLOCK": 32}


def test_an_interrupted_run_goes_on_where_it_stopped():
    work = tune.work_left([DOUBLE], "A GPU", {})
    next(tune.tune(work, CPU, tuning.user_table_path(), measure=times(2.0, 1.0)))
    left = tune.work_left([DOUBLE], "A GPU", tuning.read_table(tuning.user_table_path()))
    assert [shape_class for _, shape_class in left] == ["long"]


def test_other_candidates_make_a_measurement_out_of_date():
    run_tune(tune.work_left([DOUBLE], "A GPU", {}), 2.0, 1.0, 1.0, 3.0)
    table = tuning.read_table(tuning.user_table_path())
    assert tune.work_left([DOUBLE], "A GPU", table) == []
    changed = Tunable("double", ("short",), lambda shape_class: (LARGE, SMALL), SMALL, problem)
    assert len(tune.work_left([changed], "A GPU", table)) == 1
    assert len(tune.work_left([DOUBLE], "Another GPU", table)) == 2


def test_a_candidate_that_needs_too_much_is_refused_and_the_rest_measured(monkeypatch):
    def greedy(shape_class: str, device: torch.device):
        call = problem(shape_class, device)

        def run():
            if tuning.configuration(DOUBLE, shape_class, device) is SMALL:
                raise triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")
            return call()

        return run

    tunable = Tunable("double", ("short",), lambda shape_class: (SMALL, LARGE), SMALL, greedy)
    (outcome,) = run_tune([(tunable, "short")], 1.0)
    assert outcome.best == LARGE and "shared memory" in outcome.refused[0]
    only = Tunable("double", ("short",), lambda shape_class: (SMALL,), SMALL, greedy)
    with pytest.raises(RuntimeError, match="no candidate of double runs for short"):
        run_tune([(only, "short")])


@pytest.mark.parametrize("text", ["{", "[]", '{"A GPU": {"double": {"short": {"num_warps": 4}}}}', '{"A GPU": 3}'])
def test_a_broken_table_is_named(text):
    tuning.user_table_path().write_text(text)
    with pytest.raises(ValueError, match="triton.json is not a table of configurations .* run pruneops tune"):
        tuning.read_table(tuning.user_table_path())


def test_the_shipped_table_names_kernels_and_classes_that_exist():
    known = {tunable.name: tunable for tunable in TUNABLES}
    for kernels in tuning.shipped_table().values():
        for name, classes in kernels.items():
            assert set(classes) <= set(known[name].shape_classes)
            for shape_class, entry in classes.items():
                blocks = {frozenset(config.blocks) for config in known[name].candidates(shape_class)}
                assert frozenset(Config.from_dict(entry).blocks) in blocks


def test_no_two_kernels_share_a_name_in_the_tables():
    names = [tunable.name for tunable in TUNABLES]
    assert len(set(names)) == len(names)


def test_the_table_is_plain_json():
    run_tune([(DOUBLE, "short")], 2.0, 1.0)
    table = json.loads(tuning.user_table_path().read_text())
    entry = table["A GPU"]["double"]["short"]
    assert entry["blocks"] == {"BLOCK": 32} and entry["ms"] == 1.0 and entry["default_ms"] == 2.0
