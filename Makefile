# Every target sets itself up: a machine with make and Python 3.11 or newer is enough.
#   make test                                  the suite
#   make test PYTHON=python3.13 VENV=.venv-b   with another Python, beside the first
#   make test PIP_ARGS="jax==0.10.2 jaxlib==0.10.2"   with these versions (in a fresh VENV)
#   make test PYTEST_ARGS="-k lookup -x"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=
# What `make bench` measures beside ours, in an environment of its own. Where pip has no CPU build
# of torch for this Python, say where to find one: PEERS_PIP_ARGS="--find-links FOLDER".
PEERS_VENV = .venv-peers
# Where `make gpu` puts its results.
OUT ?= gpu-results
PEERS_PIP_ARGS ?=

PY = $(VENV)/bin/python

.DEFAULT_GOAL := test
.PHONY: test demo lint format bench gpu test-newest clean

test: $(VENV)/.installed-test
	@$(PY) .ci/versions.py
	$(PY) -m pytest $(PYTEST_ARGS)

demo: $(VENV)/.installed-examples
	$(PY) examples/ctr.py

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.installed-bench
	@$(MAKE) --no-print-directory $(PEERS_VENV)/.installed-peers || \
	  echo "== bench: without torch and FBGEMM, which could not be installed"
	@$(PY) .ci/versions.py
	set -e; for script in benchmarks/[!_]*.py; do $(PY) "$$script" $(BENCH_ARGS); done

# The suite once more, where this machine has a newer Python than PYTHON: newer jax need one.
test-newest:
	@newest=$$(.ci/newest-python $(PYTHON)); \
	if [ -z "$$newest" ]; then \
	  echo "== test-newest: skipped, no Python newer than '$(PYTHON)' found"; \
	else \
	  $(MAKE) test VENV=.venv-newest PYTHON="$$newest"; \
	fi

# One stamp per extra; installed again whenever pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "'$(PYTHON)' is not Python 3.11+: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable ".[$*]" $(PIP_ARGS)
	touch $@

# Two versions that fit each other; all that FBGEMM imports comes with torch.
$(PEERS_VENV)/.installed-peers:
	test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet numpy torch==2.13.0 $(PEERS_PIP_ARGS)
	$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps fbgemm-gpu-cpu==1.8.0 \
	  $(PEERS_PIP_ARGS)
	touch $@

# On a machine with a GPU, with the Python that has jax, optax, pytest and torch there: nothing is
# installed. Checks first, then times; what either leaves in OUT is kept if the other fails.
gpu:
	.ci/gpu "$(OUT)" $(PYTHON)

clean:
	rm -rf .venv .venv-newest .venv-peers .jax_cache .pytest_cache .mypy_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
