# Two commands on a fresh machine with Python 3.11 (venv), git and make:
#   make train   set up .venv with the tested set, then train the embedded default (recipes/shapes.yaml)
#   make test    the same set-up, then the tests
# Both are safe to repeat; the set-up runs again only when setup.cfg, pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup train test clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, but this is " + sys.version.split()[0] + ": run make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,plots]'
	@touch $@

train: $(STAMP)
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train.py $(ARGS)

# --max-worker-restart 0: a test that kills its process fails; with a new worker pytest-xdist would wait without end
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

clean:
	rm -rf $(VENV) build detr_accel.egg-info
