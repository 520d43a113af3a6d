# Convenience for Linux and macOS; everything works by `pip install` and `hyperdreambooth` alone, on Windows too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --no-compile -c constraints.txt
MINUTES ?= 170
WORLD ?= toon

.PHONY: demo app test test-app check bench weights evaluate clean

# personalize a face nobody trained on, and draw it in new pictures: demo/index.html
demo: $(VENV)/installed
	@echo "== personalizing a face and drawing it: about half a minute"
	$(BIN)/hyperdreambooth demo -o demo --overwrite

# the page in the browser, on this machine alone
app: $(VENV)/installed-app
	@echo "== starting the page"
	$(BIN)/hyperdreambooth app

test: $(VENV)/installed-dev
	@echo "== running the tests: about a quarter of an hour on two cores"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# the page in a real browser, some minutes; needs Chromium (Debian: apt-get install chromium; elsewhere CHROMIUM=path/to/it)
test-app: $(VENV)/installed-dev $(VENV)/installed-app-tests
	$(BIN)/python -m pytest tests/browser/app.py -s

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# speed and memory beside named peers, some minutes: everything that needs a GPU where there is one, else the CPU's; then the tables of docs
bench: $(VENV)/installed-dev
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python benchmarks/gpu.py; else $(BIN)/python benchmarks/speed.py && $(BIN)/python benchmarks/tables.py; fi

# train the embedded world (WORLD=heads: the second one), or go on with it: whatever is unfinished first
weights: $(VENV)/installed-dev
	$(BIN)/python -m worlds.$(WORLD).train all --minutes $(MINUTES)

evaluate: $(VENV)/installed
	$(BIN)/hyperdreambooth evaluate -o benchmarks/results/fidelity.json

# pip says each package as it comes: torch is large, and silence for minutes looks like a fault
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV), once: torch, diffusers and others. Some minutes, by your connection"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	@echo "== installing what $* needs besides, once"
	$(PIP) -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) demo build dist
