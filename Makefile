# Two commands do everything on a fresh machine: `make bench` and `make test`.
#
# Variables: VENV      virtual environment, created if it does not exist
#            PYTHON    interpreter of the environment
#            PIP_ARGS  arguments for the installation of torch, such as
#                      PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#            ARGS      arguments for the command itself, such as make test ARGS="-k gather"
#            WORKERS   number of test processes; 0 runs the tests in pytest's own process, for --pdb
#            TORCH     version of torch for test-torch, such as 2.11.0, or newest

VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
ISA ?= avx2
WORKERS ?= 2
TORCH ?= newest
TORCH_SPEC ?= torch>=2.11
BENCH_OUT ?= benches/out
DEMO_OUT ?= demo/out

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
BUILD := $(BIN)/python setup.py -q build_ext --inplace
STAMPS := build/stamps/$(subst /,_,$(abspath $(VENV)))
BUILD_INPUTS := setup.py $(wildcard tools/build_plan.py tools/ninja_build.py) $(shell find csrc -type f)
CPP_FILES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

# The tests that run under a sanitizer or with a forced instruction set.
OP_TESTS := $(addprefix tests/ops/test_,gathered_conv2d.py gathered_conv2d_fused.py gathered_conv2d_poison.py autograd.py) \
  tests/dispatch/test_gathered_conv2d_packed.py tests/backends/test_native_backward.py $(addprefix tests/plan/test_,pooling.py joined.py watch.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help bench bench-training demo docs test test-torch test-isa test-interpret test-ptx compile-triton compile-cuda package setup lint format build sanitize clean check

help: ## Show the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bench: $(STAMPS)/bench $(STAMPS)/built ## Set up, run the speed-up study, write its report to benches/out
	$(BIN)/python -m benches.study --out $(BENCH_OUT) $(ARGS)

bench-training: $(STAMPS)/bench $(STAMPS)/built ## Set up, run the study of training, write its report to benches/out/training
	$(BIN)/python -m benches.training --out $(BENCH_OUT)/training $(ARGS)

demo: setup ## Set up, train, prune and evaluate on the built-in suite, report to demo/out
	$(BIN)/python -m bap.cli demo --out $(DEMO_OUT) $(ARGS)

docs: setup ## Build the documentation in docs/_build/html, warnings as errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)

test: setup ## Set up and run all tests
	$(PYTEST) $(ARGS)

# Libraries are built in place: each version of torch needs a copy of the sources and an environment.
TORCH_COPY = build/torch-$(TORCH)
test-torch: ## Run all tests with TORCH=2.11.0 or another version, in a separate environment and copy of the sources
	mkdir -p $(TORCH_COPY)
	find $(TORCH_COPY) -path $(TORCH_COPY)/build -prune -o -type f ! -name '*.so' -exec rm {} +
	git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - | tar -xf - -C $(TORCH_COPY)
	$(MAKE) -C $(TORCH_COPY) test VENV=$(abspath .venv-torch$(TORCH)) TORCH_SPEC="$(if $(filter newest,$(TORCH)),torch>=2.11,torch==$(TORCH))"

test-isa: setup ## Run the tests of the ops with ISA=avx512, avx2, avx512_emulated, neon_emulated or none
	BAP_KERNELS_ISA=$(ISA) $(PYTEST) -q $(OP_TESTS) $(ARGS)

test-interpret: setup ## Run the Triton kernels in Triton's interpreter, on CPU tensors
	TRITON_INTERPRET=1 $(PYTEST) -q tests/interpret $(ARGS)

test-ptx: setup ## Execute the compiled kernels, as PTX, on the CPU; what nvcc or Triton compiles, where they are there
	BAP_KERNELS_TEST_PTX=1 $(PYTEST) -q tests/ptx $(ARGS)

compile-triton: setup ## Compile every configuration of the Triton kernels for sm_80, sm_90 and sm_100; needs no GPU
	$(BIN)/python -m tools.compile_triton $(ARGS)

compile-cuda: setup ## Compile every instance of the CUDA kernels for sm_80, sm_90a and sm_100; needs nvcc, no GPU
	$(BIN)/python -m tools.compile_cuda $(ARGS)

package: setup ## Build sdist and wheel in dist/, and try them in a clean environment without compilers; needs a network
	$(BIN)/python -m tools.check_packages --out dist $(ARGS)

setup: $(STAMPS)/dev $(STAMPS)/built ## Only set up, for development

lint: setup ## Check style, types and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy bap_kernels python/bap benches tools setup.py conftest.py
	$(CPP_FILES) | xargs $(BIN)/clang-format --dry-run --Werror

format: setup ## Format Python and C++ in place
	$(BIN)/python -m ruff check --fix -q .
	$(BIN)/python -m ruff format .
	$(CPP_FILES) | xargs $(BIN)/clang-format -i

build: $(STAMPS)/tools ## Build the extension in place
	$(BUILD)

sanitize: setup ## Run the tests of the ops under AddressSanitizer and UBSan
	BAP_KERNELS_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	BAP_KERNELS_LIBRARY=$(CURDIR)/build/sanitize/_C.so \
	$(BIN)/python -m pytest -q -p no:cacheprovider $(OP_TESTS) $(ARGS)

clean: ## Remove everything that was built, except for the virtual environment
	rm -rf build dist *.egg-info benches/out docs/_build bap_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Reports missing system packages in one line.
check:
	@sh tools/check_system.sh "$(VENV)" "$(PYTHON)"

$(BIN)/python: | check
	$(PYTHON) -m venv $(VENV)

# torch and torchvision are resolved together, so that pip does not download two versions of torch.
$(STAMPS)/tools: pyproject.toml | check $(BIN)/python
	@echo "Installing torch and the build tools into $(VENV): a few minutes on the first run"
	$(PIP) install $(PIP_ARGS) "$(TORCH_SPEC)" torchvision "setuptools>=77" wheel "ninja>=1.11"
	@mkdir -p $(@D) && touch $@

# Built before pip runs, because pip hides which parts are built; pip then has nothing left to compile.
$(STAMPS)/bench $(STAMPS)/dev: $(STAMPS)/tools
	$(BUILD)
	$(PIP) install -e '.[$(@F)]' --no-build-isolation
	@mkdir -p $(@D) && touch $@ $(STAMPS)/built

# Compiles only what changed.
$(STAMPS)/built: $(BUILD_INPUTS) | $(STAMPS)/tools
	$(BUILD)
	@mkdir -p $(@D) && touch $@
