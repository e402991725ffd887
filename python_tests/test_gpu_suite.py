"""The GPU suite itself, on a machine without a GPU: its script, its statistics, its report, and a rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu_report, gpu_timing  # noqa: E402  (the benchmarks are no installed package)

SCRIPT = ROOT / "bench" / "gpu.sh"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process that sees no GPU, also on a machine that has one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PRUNEOPS_")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([str(part) for part in command], env=env, cwd=ROOT, capture_output=True, text=True)


# ---------------------------------------------------------------------- the script


def test_the_script_has_no_syntax_error():
    result = run("bash", "-n", SCRIPT)
    assert (result.returncode, result.stderr) == (0, "")


def test_help_names_results_and_exit_statuses():
    result = run("bash", SCRIPT, "--help")
    assert result.returncode == 0
    for word in ("summary.md", "bench.json", "gpu_tests.log", "--only", "exit status", "PRUNEOPS_JOBS"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DIR is missing"),
        (["one", "two"], "more than one folder: "),
        (["one", "--fast"], "unknown option --fast"),
        (["one", "--only"], "--only needs a list"),
        (["one", "--only="], "--only needs a list"),
        (["one", "--only", "build,tests"], "not 'tests'"),
        (["one", "--only=build,,test"], "not ''"),
    ],
)
def test_wrong_calls_are_refused_before_anything_happens(tmp_path, arguments, message):
    result = run("bash", SCRIPT, *(tmp_path / a if a in ("one", "two") else a for a in arguments))
    assert result.returncode == 2
    assert message in result.stderr and "usage: bash bench/gpu.sh DIR" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", ["0", "481", "ten", "-5"])
def test_a_step_limit_out_of_range_is_refused(tmp_path, seconds):
    result = run("bash", SCRIPT, tmp_path / "run", PRUNEOPS_STEP_SECONDS=seconds)
    assert result.returncode == 2
    assert f"got {seconds}\n" in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("jobs", ["0", "many", "-5"])
def test_a_number_of_processes_out_of_range_is_refused(tmp_path, jobs):
    result = run("bash", SCRIPT, tmp_path / "run", PRUNEOPS_JOBS=jobs)
    assert result.returncode == 2
    assert f"got {jobs}\n" in result.stderr and not (tmp_path / "run").exists()


def test_a_machine_without_a_gpu_is_refused_and_nothing_is_written(tmp_path):
    result = run("bash", SCRIPT, tmp_path / "run", "--only", "test")
    assert result.returncode == 3
    assert "this machine cannot run the GPU suite" in result.stderr
    assert "built without CUDA" in result.stderr or "finds no NVIDIA GPU" in result.stderr
    assert not (tmp_path / "run").exists()


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    missing = tmp_path / "no-such-python"
    result = run("bash", SCRIPT, tmp_path / "run", PYTHON=str(missing), CUDACXX=str(tmp_path / "no-such-nvcc"))
    assert result.returncode == 3
    assert f"no {missing}" in result.stderr and "no nvcc" in result.stderr


# Stands in for Python: the checks pass, reports are written by the real one, and pytest does what a file says.
STUB = """#!/bin/bash
case "$*" in
  *"gpu_report environment"*) echo '{}' > "${@: -1}" ;;
  *gpu_report*) exec "$REAL_PYTHON" "$@" ;;
  *pytest*) echo "pytest was called"; exec bash "$BEHAVIOUR" ;;
  *xdist*) echo True ;;
esac
"""


class Stubbed:
    """The script on a machine where pytest does what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stub, self.behaviour = folder / "run", folder / "python", folder / "behaviour"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)

    def environment(self, does: str, **more: str) -> dict[str, str]:
        self.behaviour.write_text(does)
        return {"PYTHON": str(self.stub), "REAL_PYTHON": sys.executable, "BEHAVIOUR": str(self.behaviour), **more}

    def __call__(self, does: str, only: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run("bash", SCRIPT, self.folder, "--only", only, **self.environment(does, **more))

    def steps(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "bench.json").read_text())["steps"]

    def status(self) -> dict[str, str]:
        return {step["step"]: step["status"] for step in self.steps()}


def suites(kind: str) -> dict[str, Path]:
    """Files by the name of their suite."""
    folder, prefix = {"test": ("python_tests/gpu", "test_gpu_"), "bench": ("bench", "test_bench_gpu_")}[kind]
    return {path.stem.removeprefix(prefix): path for path in sorted((ROOT / folder).glob(f"{prefix}*.py"))}


# Suites whose every test takes Triton; all others have some for each backend.
IN_TRITON_ONLY = {"test": {"agreement"}, "bench": set()}


def steps_of(kind: str) -> set[str]:
    backends = {name: ("triton",) if name in IN_TRITON_ONLY[kind] else ("native", "triton") for name in suites(kind)}
    return {f"{kind}_{name}_{backend}" for name, each in backends.items() for backend in each}


def test_failures_are_reported_and_a_second_run_repeats_only_them(tmp_path):
    suite, steps = Stubbed(tmp_path), steps_of("bench")
    first = suite("exit 1", "bench")
    assert first.returncode == 1 and "pytest was called" in first.stdout
    assert suite.status() == dict.fromkeys(steps, "failed")
    assert "FAILED: bench_" in (suite.folder / "summary.md").read_text()
    second = suite("sleep 30", "bench", PRUNEOPS_STEP_SECONDS="1")
    assert second.returncode == 1 and suite.status() == dict.fromkeys(steps, "timed out")
    third = suite("exit 0", "bench")
    assert third.returncode == 0 and suite.status() == dict.fromkeys(steps, "passed")
    assert f"**{len(steps)} of {len(steps)} steps passed**" in (suite.folder / "summary.md").read_text()
    fourth = suite("exit 1", "bench")
    assert fourth.returncode == 0 and fourth.stdout.count("passed before") == len(steps)


def test_tests_run_side_by_side_and_benchmarks_alone(tmp_path):
    suite, log = Stubbed(tmp_path), tmp_path / "log"
    log.touch()
    begin_and_end = f"echo begin >> {log}; sleep 0.3; echo end >> {log}"

    def most_at_once() -> int:
        running, most = 0, 0
        for word in log.read_text().split():
            running += 1 if word == "begin" else -1
            most = max(most, running)
        log.write_text("")
        return most

    environment = {"PRUNEOPS_JOBS": "16", "PRUNEOPS_GPU_REHEARSAL": "1"}
    assert suite(begin_and_end, "test", **environment).returncode == 0
    assert 1 < most_at_once() <= 4
    assert steps_of("test") <= {name for name, status in suite.status().items() if status == "passed"}
    assert suite(begin_and_end, "bench", **environment).returncode == 0
    assert most_at_once() == 1


def test_what_matters_most_comes_first(tmp_path):
    suite = Stubbed(tmp_path)
    assert suite("exit 0", "test,bench", PRUNEOPS_GPU_REHEARSAL="1").returncode == 0
    planned = (suite.folder / "state" / "plan").read_text().split()
    assert set(planned) == steps_of("test") | steps_of("bench") | {name for name in planned if "sanitize" in name}
    assert planned[:3] == ["test_short_native", "test_short_triton", "test_attention_native"]
    kinds = [name.split("_")[0] for name in planned]
    assert kinds == sorted(kinds, key=["test", "bench", "sanitize"].index)
    assert next(name for name in planned if name.startswith("bench")) == "bench_attention_native"
    assert [step["step"] for step in suite.steps() if "sanitize" not in step["step"]] == planned[:-3]


def test_an_interrupted_run_stops_its_steps_and_reports(tmp_path):
    suite, marker = Stubbed(tmp_path), tmp_path / "began"
    environment = suite.environment(f"touch {marker}; sleep 60; touch {marker}.over", PRUNEOPS_GPU_REHEARSAL="1")
    command = ["bash", str(SCRIPT), str(suite.folder), "--only", "bench"]
    process = subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not marker.exists():
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in errors
    assert "not finished: bench_" in (suite.folder / "summary.md").read_text()


# ---------------------------------------------------------------------- which tests run


@pytest.mark.parametrize("expression", [(), ("-m", "not slow"), ("-m", "gpu")])
def test_gpu_tests_are_deselected_without_a_gpu(expression):
    files = ("python_tests/gpu/test_gpu_library.py", "bench/test_bench_gpu_compaction.py")
    result = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *expression)
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "deselected" in result.stdout and "skipped" not in result.stdout


def test_every_test_and_benchmark_that_needs_a_gpu_is_marked():
    files = [*suites("test").values(), *suites("bench").values()]
    assert len(files) > 16
    assert [path.name for path in files if "pytest.mark.gpu" not in path.read_text()] == []


# Prints how many tests of each file the marks choose that the script gives.
COUNTING = """
import collections, json

def pytest_collection_finish(session):
    found = collections.defaultdict(collections.Counter)
    for item in session.items:
        marks = {mark.name for mark in item.iter_markers()}
        found[item.path.stem]["triton" if "triton" in marks else "native"] += 1
        found[item.path.stem]["rehearsed"] += {"triton", "rehearsed"} <= marks
        assert ("[triton" in item.name) <= ("triton" in marks), item.nodeid
    print("found:" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "counting.py").write_text(COUNTING)
    command = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "counting")
    files = (*suites("test").values(), *suites("bench").values())
    environment = {"PRUNEOPS_GPU_REHEARSAL": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    result = run(*command, *files, **environment)
    assert result.returncode == 0, result.stdout[-3000:]
    return json.loads(next(line[6:] for line in result.stdout.splitlines() if line.startswith("found:")))


@pytest.mark.parametrize("kind", ["test", "bench"])
def test_every_suite_has_tests_for_the_backends_that_the_script_runs_it_on(collected, kind):
    for name, path in suites(kind).items():
        found = collected[path.stem]
        assert bool(found.get("native")) == (name not in IN_TRITON_ONLY[kind]), path.stem
        assert 0 < found["rehearsed"] <= found["triton"], path.stem


def rehearsal(marks: str, *files: str, **environment: str) -> None:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks)
    result = run(*command, *files, PRUNEOPS_GPU_REHEARSAL="1", OMP_NUM_THREADS="1", **environment)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "skipped" not in result.stdout


def test_the_short_tests_and_a_benchmark_pass_a_rehearsal_on_the_cpu():
    rehearsal("gpu and not triton", "python_tests/gpu/test_gpu_short.py", "bench/test_bench_gpu_selection.py")


def test_some_tests_and_benchmarks_of_the_kernels_in_triton_pass_a_rehearsal_interpreted():
    files = ("test_gpu_attention", "test_gpu_selection", "test_gpu_compaction", "test_gpu_routing", "test_gpu_library")
    benchmarks = ("bench/test_bench_gpu_attention.py", "bench/test_bench_gpu_selection.py")
    tests = [f"python_tests/gpu/{name}.py" for name in files]
    rehearsal("gpu and triton and rehearsed", *tests, *benchmarks, TRITON_INTERPRET="1")


def test_kernels_in_triton_are_not_skipped_where_nothing_interprets_them():
    test = "python_tests/gpu/test_gpu_selection.py::test_protected_rows_stay_and_do_not_count"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "triton", test)
    result = run(*command, PRUNEOPS_GPU_REHEARSAL="1")
    assert result.returncode == 1 and "1 failed" in result.stdout
    assert "a process started with TRITON_INTERPRET=1" in result.stdout


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu_passes_every_step(tmp_path):
    """Finds what is wrong with the tests and benchmarks themselves, before anybody pays for a GPU."""
    result = run("bash", SCRIPT, tmp_path, "--only", "test,bench", PRUNEOPS_GPU_REHEARSAL="1", OMP_NUM_THREADS="1")
    summary = (tmp_path / "summary.md").read_text()
    assert result.returncode == 0, summary
    assert "A rehearsal on the CPU" in summary and "FAILED" not in summary and "not run" not in summary
    run_json = json.loads((tmp_path / "bench.json").read_text())
    assert {bench["extra_info"]["op"] for bench in run_json["benchmarks"]} >= {
        "segment_topk", "segment_threshold", "select_compact", "gather_rows", "scatter_rows",
        "last_query_scores", "column_scores", "dpc_knn", "merge_mean", "varlen_attention", "decode_attention",
    }  # fmt: skip
    assert {bench["extra_info"]["backend"] for bench in run_json["benchmarks"]} == {"native", "triton"}
    assert "passed" in (tmp_path / "gpu_tests.log").read_text()


# ---------------------------------------------------------------------- statistics


def test_a_comparison_is_the_median_of_its_rounds():
    result = gpu_timing.summarise([1.0, 3.0, 2.0], [8.0, 6.0, 5.0])
    assert (result.ours_ms, result.peer_ms, result.ratio) == (2.0, 6.0, 3.0)
    assert (result.ratio_low, result.ratio_high) == (2.0, 8.0)
    assert result.spread == pytest.approx(1.0) and result.rounds == 3


def test_sides_alternate_and_so_does_who_goes_first():
    order: list[str] = []

    def side(name: str, ms: float) -> Any:
        def one_round() -> float:
            order.append(name)
            return ms

        return one_round

    result = gpu_timing.alternate(side("ours", 2.0), side("peer", 5.0), rounds=4)
    assert order == ["ours", "peer", "peer", "ours"] * 2
    assert (result.ratio, result.spread, result.rounds) == (2.5, 0.0, 4)


@pytest.mark.parametrize(
    ("bytes_per_set", "expected"),
    [(1 << 30, 4), (60_000_000, 4), (20_000_000, 7), (4_000_000, 31), (1000, 48), (0, 48)],
)
def test_buffers_rotate_through_twice_the_cache(bytes_per_set, expected):
    assert gpu_timing.sets_needed(bytes_per_set, 60_000_000) == expected
    if gpu_timing.MIN_SETS < expected < gpu_timing.MAX_SETS:
        assert expected * bytes_per_set > 2 * 60_000_000


@pytest.mark.parametrize(("ms", "expected"), [(0.005, 2000), (0.1, 200), (50.0, 3), (0.0, 2000)])
def test_a_round_repeats_short_calls_and_spares_long_ones(ms, expected):
    assert gpu_timing.repeats_for(ms, round_ms=20.0) == expected


# ---------------------------------------------------------------------- the report


def comparison(ours_ms: float, peer_ms: float) -> dict[str, float]:
    return gpu_timing.summarise([ours_ms] * 3, [peer_ms] * 3).as_dict()


def made_up_benchmark(**changes: Any) -> dict[str, Any]:
    info: dict[str, Any] = {
        **comparison(0.004, 0.024),
        "op": "segment_topk",
        "backend": "native",
        "workload": "llava_next_7b, 1 x 2880",
        "peer": "topk + sort + cumsum",
        "dtype": "float32",
        "eager": comparison(0.010, 0.030),
        "ceilings": {
            "copy_gbs": 1000.0, "bf16_gemm_tfs": 100.0, "tf32_gemm_tfs": 50.0, "fp32_gemm_tfs": 10.0,
            "launch_eager_us": 5.0, "launch_graph_us": 2.5,
        },
        "targets": {"ratio": 5.0, "us": 8.0, "of_copy": None},
    }  # fmt: skip
    return {"name": "made up", "extra_info": info | changes}


JUNIT = """<testsuites><testsuite>
<testcase classname="gpu.test_gpu_scores" name="test_good"/>
<testcase classname="gpu.test_gpu_scores" name="test_bad"><failure message="no"/></testcase>
<testcase classname="gpu.test_gpu_scores" name="test_left_out"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of which one step failed, one was cut off while it wrote, and one never began."""
    state = tmp_path / "state"
    state.mkdir()
    steps = [
        ("build", "passed"),
        ("test_scores", "failed"),
        ("bench_selection", "passed"),
        ("bench_scores", "timed out"),
    ]
    for began, (name, status) in enumerate(steps):
        step = {"step": name, "status": status, "seconds": 7, "began": began}
        (state / f"{name}.status").write_text(json.dumps(step))
    (state / "plan").write_text("bench_selection\nbench_scores\nbench_compaction\n")
    (state / "test_scores.xml").write_text(JUNIT)
    missed = made_up_benchmark(op="gather_rows", rate=700.0, rate_unit="GB/s", of_ceiling=0.7,
                               targets={"ratio": 7.0, "us": None, "of_copy": 0.88})  # fmt: skip
    slower = made_up_benchmark(**comparison(0.005, 0.025), backend="triton", eager=None)
    content = json.dumps({"benchmarks": [made_up_benchmark(), missed, slower]})
    (state / "bench_selection.json").write_text(content)
    (state / "bench_scores.json").write_text(content[:100])
    environment = {"device": "A device", "driver": "1.2.3", "commit": "abc", "versions": {"torch": "2.99"}}
    (state / "environment.json").write_text(json.dumps(environment))
    return tmp_path


def test_the_summary_shows_conditions_steps_failures_and_ratios(folder):
    assert gpu_report.main(["summary", str(folder)]) == 0
    text = (folder / "summary.md").read_text()
    for part in (
        "**FAILED: test_scores, bench_scores; 2 of 5 steps passed; not finished: bench_compaction**",
        "| bench_compaction | not run | - | - |",
        "A device; driver 1.2.3",
        "torch 2.99",
        "Commit: abc",
        "| test_scores | failed | 7 | 1 passed, 1 failed, 1 skipped |",
        "gpu.test_gpu_scores::test_bad",
        "copy 1000 GB/s",
        "| 24.00 | 4.00 | **6.00** (6.00 to 6.00) | 5.00 | **5.00** (5.00 to 5.00) | 10.00: 3.00 / - | - / - | 0% / 0%",
        "| 24.00 | 4.00 | **6.00** (6.00 to 6.00) | - | - | 10.00: 3.00 / - | 700 GB/s (70%) / - | 0% / - |",
        "| met met / met met |",
        "Targets met by native: 2 of 4.",
        "Targets met by triton: 2 of 2.",
        "missed: `gather_rows`, llava_next_7b, 1 x 2880, float32, against topk + sort + cumsum: 6.00x, target 7x",
        "0.70 of the copy, target 0.88",
    ):
        assert part in text
    assert "rehearsal" not in text
    assert len(json.loads((folder / "bench.json").read_text())["benchmarks"]) == 3
    assert text.count("| `segment_topk` |") == 1, "both backends share a row"


def test_a_summary_without_benchmarks_says_so(folder):
    for path in (folder / "state").glob("bench_*"):
        path.unlink()
    gpu_report.write_summary(folder)
    assert "No benchmark has finished." in (folder / "summary.md").read_text()


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert gpu_report.main(["summary", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_cutlass_headers_are_looked_for_in_the_given_folder(tmp_path):
    assert "not set" in gpu_report._cutlass("")
    assert "no cutlass/version.h" in gpu_report._cutlass(str(tmp_path))
    header = tmp_path / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n")
    assert gpu_report._cutlass(str(tmp_path)) == "4.2.1"
