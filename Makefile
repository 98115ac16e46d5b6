# make reproduce | make test | make bench: each builds .venv from the lock by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup reproduce test bench clean

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

test: setup
	$(BIN)/python -m pytest $(ARGS)

# Ratios measured in one run, written to report/bench.json.
bench: setup
	$(BIN)/python -m experiments.bench $(ARGS)

clean:
	rm -rf $(VENV) report
