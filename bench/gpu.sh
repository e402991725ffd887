#!/usr/bin/env bash
# Builds pruneops on a machine with an NVIDIA GPU, runs the GPU tests and the GPU benchmarks of both backends that have
# kernels for it, native (CUDA) and triton, and writes a report.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bash bench/gpu.sh DIR [--only build,test,bench]

Needs an NVIDIA GPU, nvcc, cmake, ninja and a python3 with torch, triton, pytest, pytest-benchmark, hypothesis,
transformers and pybind11. Uses no network and installs nothing. Tests come first, then benchmarks, each with what
matters most at the head, and compute-sanitizer last. Writes into DIR:

  summary.md      device, versions, commit, what passed, table of ratios
  bench.json      everything behind the table
  gpu_tests.log   output of the tests and of compute-sanitizer
  state/          a few files a step; what passed is not run again while sources and torch stay the same, and what
                  other sources left is removed

The three results are rewritten after every step, so an interrupted run leaves what it had. The exit status is 0 if
every step passed, 1 if one failed, 2 for a wrong call, 3 on a machine that cannot run this.

  PYTHON                  the interpreter (python3)
  PRUNEOPS_STEP_SECONDS   limit of one step (450, at most 480)
  PRUNEOPS_JOBS           processes that tests may use at a time (one a CPU; more than one a step takes pytest-xdist)
  PRUNEOPS_CUDA_ARCH_LIST what to compile for (the GPU of this machine)
  PRUNEOPS_CUTLASS_DIR    a folder with CUTLASS headers; no kernel uses them yet, the report names their version
  PRUNEOPS_COMMIT         the commit to report where there is no git repository
  PRUNEOPS_GPU_REHEARSAL  1: run tests and benchmarks small, on the CPU, to try the scripts; of those in Triton a few,
                          interpreted
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
case "${PRUNEOPS_JOBS:-1}" in
  '' | *[!0-9]* | 0) wrong_call "PRUNEOPS_JOBS must be a number of processes, got ${PRUNEOPS_JOBS:-}" ;;
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

needed = ("torch", "triton", "pytest", "pytest_benchmark", "hypothesis", "transformers", "pybind11", "setuptools")
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
unset PRUNEOPS_BACKEND PRUNEOPS_LIBRARY TRITON_INTERPRET
# A step that passed is only trusted while nothing it depends on has changed.
fingerprint="$({
  find csrc cmake pruneops python_tests bench -type f -not -path 'bench/results/*' -not -name '*.so' -not -name '*.pyc' \
    -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 cksum
  cksum CMakeLists.txt setup.py pyproject.toml conftest.py
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
  "$python" -c 'from importlib.metadata import version; print(version("triton"))'
  printf '%s\n' "$rehearsal"
} | cksum | tr -s ' ' '-')"

for old in "$state"/*.status; do
  if [ -f "$old" ] && ! grep -q "\"fingerprint\": \"$fingerprint\"" "$old"; then
    rm -f "${old%.status}".{status,log,xml,json}
  fi
done

failed=0
# The steps that are running: process, name, when it began in seconds and in nanoseconds.
pids=()
names=()
starts=()
begans=()

report() {
  local log
  "$python" -m bench.gpu_report summary "$dir" || failed=1
  : >"$dir/gpu_tests.log"
  for log in "$state"/test_*.log "$state"/sanitize_*.log; do
    [ -f "$log" ] && { printf '=== %s\n' "$(basename "$log" .log)"; cat "$log"; printf '\n'; } >>"$dir/gpu_tests.log"
  done
}

interrupted() {
  [ "${#pids[@]}" -gt 0 ] && kill "${pids[@]}" 2>/dev/null
  report
  printf 'gpu.sh: interrupted; %s has what was done\n' "$dir/summary.md" >&2
  exit 130
}
trap interrupted INT TERM

status_of() { # STEP STATUS SECONDS BEGAN
  printf '{"step": "%s", "status": "%s", "seconds": %s, "began": %s, "fingerprint": "%s"}\n' \
    "$1" "$2" "$3" "$4" "$fingerprint" >"$state/$1.status"
  printf '%-32s %s (%s s)\n' "$1" "$2" "$3"
}

finish() { # INDEX EXIT-STATUS: writes down how a step that ran has ended
  local name="${names[$1]}" status="failed"
  case "$2" in
    0) status="passed" ;;
    124 | 137) status="timed out" ;;
  esac
  # The sanitizer needs access that some virtual machines do not give; that says nothing about the kernels.
  if [[ "$name" == sanitize_* ]] && [ "$2" -ne 0 ] && grep -q 'Device not supported' "$state/$name.log"; then
    status="not available"
  fi
  status_of "$name" "$status" "$((SECONDS - starts[$1]))" "${begans[$1]}"
  if [ "$status" != "passed" ] && [ "$status" != "not available" ]; then
    failed=1
    tail -n 15 "$state/$name.log" | sed 's/^/    /'
  fi
  pids=("${pids[@]:0:$1}" "${pids[@]:$1+1}")
  names=("${names[@]:0:$1}" "${names[@]:$1+1}")
  starts=("${starts[@]:0:$1}" "${starts[@]:$1+1}")
  begans=("${begans[@]:0:$1}" "${begans[@]:$1+1}")
  report
}

room_for() { # COUNT: waits until fewer steps than that are running
  local i
  while [ "${#pids[@]}" -ge "$1" ]; do
    for i in "${!pids[@]}"; do
      if ! kill -0 "${pids[$i]}" 2>/dev/null; then
        wait "${pids[$i]}"
        finish "$i" "$?"
        continue 2
      fi
    done
    sleep 0.2
  done
}

start() { # STEP COMMAND...
  local name="$1"
  shift
  if grep -qs '"status": "passed"' "$state/$name.status"; then
    printf '%-32s passed before\n' "$name"
    return 0
  fi
  rm -f "$state/$name.status" "$state/$name.xml" "$state/$name.json"
  begans+=("$(date +%s%N)")
  starts+=("$SECONDS")
  names+=("$name")
  timeout --kill-after=10 "$limit" "$@" >"$state/$name.log" 2>&1 </dev/null &
  pids+=("$!")
}

step() { # STEP COMMAND...: alone
  room_for 1
  start "$@"
  room_for 1
}

# Tests run several steps at a time and each step in several processes: most of their time goes into oracles on the CPU
# and into compiling. A step is a process of its own, so a kernel that breaks its context breaks that step only.
jobs="${PRUNEOPS_JOBS:-$(nproc)}"
[ "$rehearsal" = 1 ] && jobs="${PRUNEOPS_JOBS:-1}"
steps_at_once="$((jobs < 4 ? 1 : jobs < 16 ? jobs / 4 : 4))"
workers="$((jobs / steps_at_once))"
parallel=(-p no:benchmark)
if [ "$workers" -gt 1 ] && [ "$("$python" -c 'import importlib.util as u; print(u.find_spec("xdist") is not None)')" = True ]; then
  parallel+=(-n "$workers")
fi

pytest_of() { # BACKEND STEP ARGUMENTS...: the command of a step of tests or benchmarks
  local marked="gpu and not triton" interpreter=()
  if [ "$1" = triton ]; then
    marked="gpu and triton"
    [ "$rehearsal" = 1 ] && marked="gpu and triton and rehearsed" interpreter=(TRITON_INTERPRET=1)
  fi
  command=(env "${interpreter[@]}" "$python" -m pytest -m "$marked" -q -p no:cacheprovider)
  command+=(--junitxml="$state/$2.xml" "${@:3}")
}

suites() { # FOLDER/FILE-PREFIX NAME...: all suites of a folder, those named here first
  local prefix="$1" file name
  shift
  for name in "$@"; do
    [ -f "$prefix$name.py" ] && printf '%s\n' "$name"
  done
  for file in "$prefix"*.py; do
    name="$(basename "$file" .py)"
    name="${name#"$(basename "$prefix")"}"
    case " $* " in *" $name "*) ;; *) printf '%s\n' "$name" ;; esac
  done
}

backends_of() { # SUITE
  case "$1" in
    agreement) echo triton ;; # it compares with CUDA
    *) echo native triton ;;
  esac
}

steps_of() { # KIND SUITE...
  local suite backend
  for suite in "${@:2}"; do
    for backend in $(backends_of "$suite"); do printf '%s\n' "$1_${suite}_$backend"; done
  done
}

mapfile -t tests < <(suites python_tests/gpu/test_gpu_ short attention selection compaction scores agreement decoder \
  async policy routing clustering position_means)
mapfile -t benches < <(suites bench/test_bench_gpu_ attention selection compaction scores clustering)

# What this call is going to do, so that a report of a run that was cut off shows what is missing.
{
  wants build && echo build
  wants test && steps_of test "${tests[@]}"
  wants bench && steps_of bench "${benches[@]}"
  wants test && printf '%s\n' sanitize_memcheck sanitize_racecheck sanitize_memcheck_triton
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
  threads=()
  [ -n "${OMP_NUM_THREADS:-}" ] || threads=(OMP_NUM_THREADS="$(($(nproc) / jobs > 1 ? $(nproc) / jobs : 1))")
  for suite in "${tests[@]}"; do
    for backend in $(backends_of "$suite"); do
      room_for "$steps_at_once"
      pytest_of "$backend" "test_${suite}_$backend" "${parallel[@]}" "python_tests/gpu/test_gpu_$suite.py"
      start "test_${suite}_$backend" env "${threads[@]}" "${command[@]}"
    done
  done
  room_for 1
fi

if wants bench; then
  for suite in "${benches[@]}"; do
    for backend in $(backends_of "$suite"); do
      name="bench_${suite}_$backend"
      pytest_of "$backend" "$name" "bench/test_bench_gpu_$suite.py" \
        --benchmark-json="$state/$name.json" --benchmark-disable-gc --benchmark-columns=median
      step "$name" "${command[@]}"
    done
  done
fi

sanitize() { # STEP TOOL BACKEND ARGUMENTS...
  if [ -z "$sanitizer" ] || [ "$rehearsal" = 1 ]; then
    status_of "$1" "not available" 0 "$(date +%s%N)"
    return
  fi
  pytest_of "$3" "$1" "${@:4}"
  # Only the kernels of pruneops where their names tell; those in Triton have no namespace.
  local checked=()
  [ "$3" = native ] && checked=(--kernel-regex kns=pruneops)
  # Without torch's cache every tensor is an allocation of its own, so that a step past its end is seen.
  start "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$2" --error-exitcode 99 --report-api-errors no \
    "${checked[@]}" "${command[@]}"
}

if wants test; then
  sanitizer="$(command -v compute-sanitizer || true)"
  [ -z "$sanitizer" ] && [ -x /usr/local/cuda/bin/compute-sanitizer ] && sanitizer=/usr/local/cuda/bin/compute-sanitizer
  short=(python_tests/gpu/test_gpu_short.py python_tests/gpu/test_gpu_attention.py -k short)
  sanitize sanitize_memcheck memcheck native "${short[@]}"
  sanitize sanitize_racecheck racecheck native "${short[@]}"
  sanitize sanitize_memcheck_triton memcheck triton "${short[@]}"
  room_for 1
fi

report
printf '\n%s\n' "$dir/summary.md"
exit "$failed"
