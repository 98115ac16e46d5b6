# make help tells what there is. All but the gpu commands build .venv from the lock by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

ROUTER_EXPERIMENTS := paper_router_lr paper_router_batch paper_aux_loss paper_combined paper_router_grid paper_selectivity paper_router_ramp

.PHONY: setup reproduce routers reference-set leaderboard test test-all test-cpus lint bench gpu-check gpu-gpt2 clean help

# What there is to make, from the comments above it.
help:
	@awk '/^# /{said = said substr($$0, 2); next} /^[a-z0-9-]+:/{if (said) printf "%-14s%s\n", substr($$1, 1, index($$1, ":") - 1), said} {said = ""}' $(MAKEFILE_LIST)

# The environment of everything below, from requirements.lock.
setup: $(VENV)/.locked

# The stamp is newer than the lock only after every install has succeeded.
$(VENV)/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"foreshock needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@touch $@

# The paper's central experiment, its figure and its lead-time table: ARGS="scale=desk" for the hour-long one.
reproduce: setup
	$(BIN)/python -m experiments.reproduce $(ARGS)

# The seven experiments on a mixture of experts, one report each; they share their healthy runs.
routers: setup
	@for experiment in $(ROUTER_EXPERIMENTS); do \
		$(BIN)/python -m experiments.reproduce experiment=$$experiment $(ARGS) || exit $$?; \
	done

# The runs behind the leaderboard, reduced to what scoring needs: hours, resumable, two runs at a time.
reference-set: setup
	@for half in dense moe; do \
		$(BIN)/python -m experiments.reproduce experiment=reference_set_$$half scale=published $(ARGS) && \
		$(BIN)/python -m analysis.reduced report=report/reference_set_$$half-published runs=runs out=results/reference_set/$$half || exit $$?; \
	done

# Score the committed runs again, in about a minute: ARGS="detector=mine.py" enters your own.
leaderboard: setup
	$(BIN)/python -m analysis.score runs=results/reference_set out=report/leaderboard $(ARGS)

# Python keeps what it compiles, test files with pytest's assertions too, which each test process would else repeat.
unexport PYTHONDONTWRITEBYTECODE

# All tests but the slow ones, on all cores, four at most: ARGS="tests/models -n 0" for a few in one process.
test: setup
	$(PYTEST) -m "not slow" $(ARGS)

# Every test: ARGS="-m slow" for those that make test leaves out.
test-all: setup
	$(PYTEST) $(ARGS)

# Style and types.
lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The numeric tests under six settings of vector instructions, one line each, as older processors would run them.
test-cpus: setup
	$(BIN)/python -m tests.six_cpus -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# Ratios measured in one run, written to report/bench.json.
bench: setup
	$(BIN)/python -m experiments.bench $(ARGS)

# The Triton kernels on this machine's GPU, checked and timed in nine minutes. No environment is built: PYTHON needs
# torch, triton and numpy. ARGS="out=FOLDER" for another place than results/gpu.
gpu-check:
	@$(PYTHON) -c 'import importlib.util as u, sys; lacks = [n for n in ("torch", "triton", "numpy") if not u.find_spec(n)]; sys.exit(f"gpu-check needs {lacks[0]}, and $(PYTHON) has none: make gpu-check PYTHON=..." if lacks else 0)'
	$(PYTHON) -m experiments.gpu_check $(ARGS)

# GPT-2 124M on this machine's GPU in eight minutes: tokens a second, and what every monitor costs. As gpu-check, but
# PYTHON also needs PyYAML and scipy. ARGS="device=cpu size=tiny" rehearses.
gpu-gpt2:
	@$(PYTHON) -c 'import importlib.util as u, sys; lacks = [n for n in ("torch", "triton", "numpy", "yaml", "scipy") if not u.find_spec(n)]; sys.exit(f"gpu-gpt2 needs {lacks[0]}, and $(PYTHON) has none: make gpu-gpt2 PYTHON=..." if lacks else 0)'
	$(PYTHON) -m experiments.bench_gpt2 $(ARGS)

# Forget the environment and the reports; runs stay.
clean:
	rm -rf $(VENV) report
