# Everything runs inside $(VENV), which the first target that needs it creates.
#
#   make demo            answer about a rendered picture, dense and pruned
#   make test            build and run the tests
#
# PYTHON=python3.12      the interpreter the environment is made from (3.10 or newer)
# TORCH=torch==2.14.1    another torch, or the path of a wheel; switching re-installs and rebuilds
# PYTEST_ARGS="-k topk"  passed on to pytest

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
TEST_JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_EXAMPLES ?= 20000
TRANSFORMERS ?= 5.16.0 5.23.0
TRITON_OLD ?= 3.6.0
DEMO_ARGS ?= --seed 0

BIN := $(VENV)/bin
PY := $(BIN)/python
WITH_BIN = PATH="$(abspath $(BIN)):$$PATH"
PIP := $(PY) -m pip --disable-pip-version-check --no-input
STAMPS := $(VENV)/.stamps
TORCH_STAMP := $(STAMPS)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
CMAKE_DIR = build/cmake-$(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
TRITON_TESTS := $(wildcard $(foreach f,selection compaction scatter_scaled routing attention policy_attention clustering merge_mean position_means opcheck,python_tests/test_$(f)*.py)) python_tests/test_malformed_calls.py python_tests/triton_kernels
TRITON_AHEAD := python_tests/triton_kernels/test_triton_ahead_of_time.py
SANITIZE_TESTS := $(wildcard $(foreach f,malformed_calls selection compaction attention policy_attention scores,python_tests/test_$(f)*.py))
# $(call with_old_triton,TESTS TO INTERPRET,WHICH TO COMPILE)
define with_old_triton
@for version in $(TRITON_OLD); do \
  folder=build/triton-$$version; \
  test -d $$folder || $(PIP) install -q --no-deps --target $$folder triton==$$version; \
  echo "--- triton $$version"; \
  export PYTHONPATH=$$folder; \
  $(PY) -c "import triton as t; assert t.__version__ == '$$version', t.__version__"; \
  TRITON_INTERPRET=1 PRUNEOPS_BACKEND=triton $(PY) -m pytest -q -n $(TEST_JOBS) $(1); \
  $(PY) -m pytest -q -n $(TEST_JOBS) $(TRITON_AHEAD) $(2); \
done
endef
BUILD_INPUTS := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml pruneops/_version.py

# Written once torch is there and given to every later install, so that nothing can move torch.
CONSTRAINTS := $(VENV)/constraints.txt

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

# ------------------------------------------------------------------ environment

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "pruneops needs Python 3.10 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	  || { echo "pruneops needs a C++17 compiler (g++ or clang++)" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	mkdir -p $(STAMPS)
	touch $@

# torch comes first and alone; everything after it is installed against that exact version.
$(TORCH_STAMP): $(STAMPS)/venv
	@echo "installing $(TORCH): a large download the first time"
	$(PIP) install -q $(TORCH)
	$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(CONSTRAINTS)
	rm -f $(STAMPS)/torch-*
	touch $@

$(STAMPS)/deps: $(TORCH_STAMP) requirements/build.txt requirements/dev.txt requirements/headers.txt
	@echo "installing build tools and test dependencies"
	$(PIP) install -q -c $(CONSTRAINTS) -r requirements/build.txt
	$(PIP) install -q -c $(CONSTRAINTS) -r requirements/dev.txt
	$(PIP) install -q --no-deps -r requirements/headers.txt
	touch $@

$(STAMPS)/build: $(STAMPS)/deps $(BUILD_INPUTS)
	@echo "compiling pruneops"
	$(WITH_BIN) $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

.PHONY: setup
setup: $(STAMPS)/deps  ## create the environment without building

.PHONY: build
build: $(STAMPS)/build  ## compile the libraries and install the package in editable mode

# ------------------------------------------------------------------ use

.PHONY: demo
demo: build  ## answer about a picture rendered from a seed, dense and pruned (DEMO_ARGS="--seed 7"); see demo/
	$(BIN)/pruneops run --out demo $(DEMO_ARGS)

.PHONY: test-cpp
test-cpp: build  ## run the C++ tests of the kernels
	$(WITH_BIN) PRUNEOPS_BUILD_TESTS=1 $(PY) setup.py -q build_ext --inplace
	$(BIN)/ctest --test-dir $(CMAKE_DIR) --output-on-failure

.PHONY: test
test: test-cpp  ## build and run the tests, C++ and Python (without those marked slow)
	$(PY) -m pytest -n $(TEST_JOBS) -m "not slow" $(PYTEST_ARGS)

.PHONY: test-all
test-all: test-cpp  ## everything: slow tests, long fuzzing, other instruction sets, transformers versions, sanitizers
	PRUNEOPS_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)
	$(MAKE) test-isa test-triton-all test-transformers sanitize

# The model tests again on the oldest supported and the newest transformers, each unpacked beside the installed one.
.PHONY: test-transformers
test-transformers: build  ## run the model tests on other versions of transformers (TRANSFORMERS="5.16.0 5.23.0")
	@for version in $(TRANSFORMERS); do \
	  folder=build/transformers-$$version; \
	  test -d $$folder || $(PIP) install -q --no-deps --target $$folder transformers==$$version; \
	  echo "--- transformers $$version"; \
	  PYTHONPATH=$$folder $(PY) -c "import transformers as t; assert t.__version__ == '$$version', t.__version__"; \
	  PYTHONPATH=$$folder $(PY) -m pytest -q -n $(TEST_JOBS) -m "not slow" python_tests/models \
	    python_tests/test_pyramiddrop_goldens.py python_tests/test_prunevid_goldens.py python_tests/test_cache.py python_tests/test_small_model.py; \
	done

# The op tests through Triton's interpreter, and every kernel in every configuration compiled for the GPUs of today. On
# the other versions of Triton, each unpacked beside the installed one, a part of both; `make test-triton-all` runs all.
.PHONY: test-triton
test-triton: build  ## test the Triton kernels, interpreted and compiled (TRITON_OLD="3.6.0": other versions, shorter)
	TRITON_INTERPRET=1 PRUNEOPS_BACKEND=triton $(PY) -m pytest -q -n $(TEST_JOBS) -m "not slow" $(TRITON_TESTS) $(PYTEST_ARGS)
	$(PY) -m pytest -q -n $(TEST_JOBS) $(TRITON_AHEAD) $(PYTEST_ARGS)
	$(call with_old_triton,python_tests/test_opcheck.py,-k every_op)

.PHONY: test-triton-all
test-triton-all: build  ## the same, all of it on the other versions of Triton as well
	TRITON_INTERPRET=1 PRUNEOPS_BACKEND=triton $(PY) -m pytest -q -n $(TEST_JOBS) $(TRITON_TESTS) $(PYTEST_ARGS)
	$(PY) -m pytest -q -n $(TEST_JOBS) $(TRITON_AHEAD) $(PYTEST_ARGS)
	$(call with_old_triton,-m "not slow" $(TRITON_TESTS),)

# `make test` covers the instruction set that is active on its own.
.PHONY: test-isa
test-isa: build  ## run the tests of vectorised kernels on the other instruction sets of this machine
	@active=$$($(PY) -c 'import pruneops; print(pruneops.build_info()["active_isa"])'); \
	for isa in scalar avx2 avx512 avx512bf16; do \
	  if [ $$isa = $$active ]; then continue; fi; \
	  if PRUNEOPS_CPU_ISA=$$isa $(PY) -c 'import pruneops; pruneops.build_info()' 2>/dev/null; then \
	    echo "--- PRUNEOPS_CPU_ISA=$$isa"; \
	    PRUNEOPS_CPU_ISA=$$isa $(PY) -m pytest -q -n $(TEST_JOBS) -m "not slow" python_tests/test_attention_*.py \
	      python_tests/test_policy_attention.py python_tests/test_scatter_scaled.py python_tests/test_routing.py; \
	  else echo "--- $$isa: not on this machine"; fi; \
	done

.PHONY: bench
bench: build  ## time every op against its torch peer and write bench/results/
	mkdir -p build
	$(PY) -m pytest bench --benchmark-json=build/bench.json --benchmark-disable-gc --benchmark-columns=median,rounds $(BENCH_ARGS)
	$(PY) -m bench.report build/bench.json --out bench/results/cpu.md

# ------------------------------------------------------------------ care

.PHONY: lint
lint: $(STAMPS)/deps  ## check style of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

.PHONY: format
format: $(STAMPS)/deps  ## rewrite Python and C++ in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# The library with sanitizers lives in build/, beside the normal one, and is chosen by PRUNEOPS_LIBRARY. Python itself
# is not instrumented, so the runtime of the sanitizer is preloaded, and libstdc++ with it, because the sanitizer has to
# find its exceptions; leaks of the interpreter are not of interest.
.PHONY: sanitize
sanitize: build  ## run the C++ tests and the op tests under AddressSanitizer and UBSan (GCC)
	$(WITH_BIN) PRUNEOPS_SANITIZE=1 PRUNEOPS_BUILD_TESTS=1 $(PY) setup.py -q build_ext --build-lib build/sanitize
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/ctest --test-dir $(CMAKE_DIR)-sanitize --output-on-failure
	env PRUNEOPS_LIBRARY=$(abspath build/sanitize/pruneops/_C.abi3.so) \
	  LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$$($${CXX:-c++} -print-file-name=lib$(lib).so))" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(PY) -m pytest -n $(TEST_JOBS) $(SANITIZE_TESTS) $(PYTEST_ARGS)

.PHONY: wheel
wheel: $(STAMPS)/deps  ## build a wheel into dist/
	rm -rf dist build/lib.* build/bdist.*
	$(WITH_BIN) $(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist

.PHONY: clean
clean:  ## remove build products, keep the environment
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f pruneops/*.so $(STAMPS)/build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
