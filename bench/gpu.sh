#!/usr/bin/env bash
# Builds pruneops on a machine with an NVIDIA GPU, runs the GPU tests and the GPU benchmarks, and writes a report.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bash bench/gpu.sh DIR [--only build,test,bench]

Needs an NVIDIA GPU, nvcc, cmake, ninja and a python3 with torch, pytest, pytest-benchmark, hypothesis, transformers
and pybind11. Uses no network and installs nothing. Writes into DIR:

  summary.md      device, versions, commit, what passed, table of ratios
  bench.json      everything behind the table
  gpu_tests.log   output of the tests and of compute-sanitizer
  state/          a few files a step; what passed is not run again while sources and torch stay the same, and what
                  other sources left is removed

The three results are rewritten after every step, so an interrupted run leaves what it had. The exit status is 0 if
every step passed, 1 if one failed, 2 for a wrong call, 3 on a machine that cannot run this.

  PYTHON                  the interpreter (python3)
  PRUNEOPS_STEP_SECONDS   limit of one step (450, at most 480)
  PRUNEOPS_CUDA_ARCH_LIST what to compile for (the GPU of this machine)
  PRUNEOPS_CUTLASS_DIR    a folder with CUTLASS headers; no kernel uses them yet, the report names their version
  PRUNEOPS_COMMIT         the commit to report where there is no git repository
  PRUNEOPS_GPU_REHEARSAL  1: run tests and benchmarks small, on the CPU, to try the scripts
TEXT
}

wrong_call() {
  printf 'gpu.sh: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

# ------------------------------------------------------------------ arguments

dir=""
only="build,test,bench"
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --only) [ $# -ge 2 ] || wrong_call "--only needs a list such as build,test"; only="$2"; shift ;;
    --only=*) only="${1#--only=}" ;;
    -*) wrong_call "unknown option $1" ;;
    *) [ -z "$dir" ] || wrong_call "more than one folder: $dir and $1"; dir="$1" ;;
  esac
  shift
done
[ -n "$dir" ] || wrong_call "DIR is missing"
[ -n "$only" ] || wrong_call "--only needs a list such as build,test"
IFS=, read -r -a wanted <<<"$only"
for phase in "${wanted[@]}"; do
  case "$phase" in
    build | test | bench) ;;
    *) wrong_call "--only knows build, test and bench, not '$phase'" ;;
  esac
done
wants() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

limit="${PRUNEOPS_STEP_SECONDS:-450}"
case "$limit" in
  '' | *[!0-9]*) wrong_call "PRUNEOPS_STEP_SECONDS must be a number of seconds, got $limit" ;;
esac
[ "$limit" -ge 1 ] && [ "$limit" -le 480 ] || wrong_call "PRUNEOPS_STEP_SECONDS must be between 1 and 480, got $limit"

# ------------------------------------------------------------------ the machine

python="${PYTHON:-python3}"
rehearsal="${PRUNEOPS_GPU_REHEARSAL:-0}"
problems=()
if ! command -v "$python" >/dev/null; then
  problems+=("no $python")
else
  while IFS= read -r problem; do
    [ -n "$problem" ] && problems+=("$problem")
  done < <("$python" - "$rehearsal" <<'CODE' 2>&1
import importlib.util
import sys

needed = ("torch", "pytest", "pytest_benchmark", "hypothesis", "transformers", "pybind11", "setuptools")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    print(f"{sys.executable} has no {', '.join(missing)}")
if "torch" not in missing and sys.argv[1] != "1":
    import torch

    if torch.version.cuda is None:
        print(f"torch {torch.__version__} was built without CUDA")
    elif not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no NVIDIA GPU (torch.cuda.is_available() is False)")
CODE
  )
fi
if wants build; then
  for tool in cmake ninja c++; do
    command -v "$tool" >/dev/null || problems+=("no $tool")
  done
  if [ -z "${CUDACXX:-}" ]; then
    CUDACXX="$(command -v nvcc || true)"
    for candidate in "${CUDA_HOME:-}/bin/nvcc" /usr/local/cuda/bin/nvcc; do
      [ -z "$CUDACXX" ] && [ -x "$candidate" ] && CUDACXX="$candidate"
    done
  fi
  [ -x "$CUDACXX" ] || problems+=("no nvcc (looked on the PATH, in CUDA_HOME and in /usr/local/cuda; CUDACXX names another)")
  export CUDACXX
fi
if [ "${#problems[@]}" -gt 0 ]; then
  printf 'gpu.sh: this machine cannot run the GPU suite:\n' >&2
  printf '  - %s\n' "${problems[@]}" >&2
  exit 3
fi

# ------------------------------------------------------------------ steps

mkdir -p "$dir/state" || exit 2
dir="$(cd "$dir" && pwd)"
state="$dir/state"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset PRUNEOPS_BACKEND PRUNEOPS_LIBRARY
# A step that passed is only trusted while nothing it depends on has changed.
fingerprint="$({
  find csrc cmake pruneops python_tests bench -type f -not -path 'bench/results/*' -not -name '*.so' -not -name '*.pyc' \
    -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 cksum
  cksum CMakeLists.txt setup.py pyproject.toml conftest.py
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
  printf '%s\n' "$rehearsal"
} | cksum | tr -s ' ' '-')"

for old in "$state"/*.status; do
  if [ -f "$old" ] && ! grep -q "\"fingerprint\": \"$fingerprint\"" "$old"; then
    rm -f "${old%.status}".{status,log,xml,json}
  fi
done

failed=0
child=""

report() {
  local log
  "$python" -m bench.gpu_report summary "$dir" || failed=1
  : >"$dir/gpu_tests.log"
  for log in "$state"/test_*.log "$state"/sanitize_*.log; do
    [ -f "$log" ] && { printf '=== %s\n' "$(basename "$log" .log)"; cat "$log"; printf '\n'; } >>"$dir/gpu_tests.log"
  done
}

interrupted() {
  [ -n "$child" ] && kill "$child" 2>/dev/null
  report
  printf 'gpu.sh: interrupted; %s has what was done\n' "$dir/summary.md" >&2
  exit 130
}
trap interrupted INT TERM

status_of() { # STEP STATUS SECONDS BEGAN
  printf '{"step": "%s", "status": "%s", "seconds": %s, "began": %s, "fingerprint": "%s"}\n' \
    "$1" "$2" "$3" "$4" "$fingerprint" >"$state/$1.status"
  printf '%-28s %s (%s s)\n' "$1" "$2" "$3"
}

step() { # STEP COMMAND...
  local name="$1" began start rc status="failed"
  shift
  if grep -qs '"status": "passed"' "$state/$name.status"; then
    printf '%-28s passed before\n' "$name"
    return 0
  fi
  rm -f "$state/$name.status" "$state/$name.xml" "$state/$name.json"
  began="$(date +%s%N)"
  start="$SECONDS"
  timeout --kill-after=10 "$limit" "$@" >"$state/$name.log" 2>&1 </dev/null &
  child=$!
  wait "$child"
  rc=$?
  child=""
  case "$rc" in
    0) status="passed" ;;
    124 | 137) status="timed out" ;;
  esac
  # The sanitizer needs access that some virtual machines do not give; that says nothing about the kernels.
  if [[ "$name" == sanitize_* ]] && [ "$rc" -ne 0 ] && grep -q 'Device not supported' "$state/$name.log"; then
    status="not available"
  fi
  status_of "$name" "$status" "$((SECONDS - start))" "$began"
  if [ "$status" != "passed" ] && [ "$status" != "not available" ]; then
    failed=1
    tail -n 15 "$state/$name.log" | sed 's/^/    /'
  fi
  report
}

pytest_step() { # STEP ARGUMENTS...
  local name="$1"
  shift
  step "$name" "$python" -m pytest -m gpu -q -p no:cacheprovider --junitxml="$state/$name.xml" "$@"
}

names_of() { # PREFIX FOLDER/FILE-PREFIX: the steps of a folder of tests
  local file name
  for file in "$2"*.py; do
    name="$(basename "$file" .py)"
    printf '%s%s\n' "$1" "${name#"$(basename "$2")"}"
  done
}

# What this call is going to do, so that a report of a run that was cut off shows what is missing.
{
  wants build && echo build
  wants test && names_of test_ python_tests/gpu/test_gpu_ && printf '%s\n' sanitize_memcheck sanitize_racecheck
  wants bench && names_of bench_ bench/test_bench_gpu_
} >"$state/plan"
"$python" -m bench.gpu_report environment "$state/environment.json" || failed=1

if wants build; then
  if [ -z "${PRUNEOPS_CUDA_ARCH_LIST:-}" ] && [ "$rehearsal" != 1 ]; then
    # From Hopper on, the instructions of one architecture need its own target.
    PRUNEOPS_CUDA_ARCH_LIST="$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major >= 9 else ""))')"
    export PRUNEOPS_CUDA_ARCH_LIST
  fi
  compgen -G 'pruneops/_C_cuda*.so' >/dev/null || rm -f "$state/build.status"
  step build env PRUNEOPS_CUDA=1 CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "$python" setup.py build_ext --inplace
fi

if wants test; then
  for name in $(names_of test_ python_tests/gpu/test_gpu_); do
    pytest_step "$name" "python_tests/gpu/test_gpu_${name#test_}.py"
  done
  sanitizer="$(command -v compute-sanitizer || true)"
  [ -z "$sanitizer" ] && [ -x /usr/local/cuda/bin/compute-sanitizer ] && sanitizer=/usr/local/cuda/bin/compute-sanitizer
  for tool in memcheck racecheck; do
    if [ -z "$sanitizer" ] || [ "$rehearsal" = 1 ]; then
      status_of "sanitize_$tool" "not available" 0 "$(date +%s%N)"
      continue
    fi
    # Without torch's cache every tensor is an allocation of its own, so that a step past its end is seen.
    step "sanitize_$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 \
      --report-api-errors no --kernel-regex kns=pruneops \
      "$python" -m pytest -m gpu -q -p no:cacheprovider --junitxml="$state/sanitize_$tool.xml" \
      python_tests/gpu/test_gpu_short.py
  done
fi

if wants bench; then
  for name in $(names_of bench_ bench/test_bench_gpu_); do
    pytest_step "$name" "bench/test_bench_gpu_${name#bench_}.py" \
      --benchmark-json="$state/$name.json" --benchmark-disable-gc --benchmark-columns=median
  done
fi

report
printf '\n%s\n' "$dir/summary.md"
exit "$failed"
