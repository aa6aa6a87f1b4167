# The two commands are `make bench` and `make test`; `make check` and `make docs` are what CI runs
# beside them.
# Each makes .venv and installs what it needs; PYTHON names the interpreter that makes it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITE ?= embedded
# Processes that share the tests; each needs some 3 GB.
TEST_PROCESSES ?= 2

# An installation is good as long as its stamp names the same requirements, whatever the file times.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
BENCH_STAMP := $(VENV)/.installed-bench-$(KEY)
DEV_STAMP := $(VENV)/.installed-dev-$(KEY)
LOG := $(VENV)/install.log

.PHONY: install bench test check format docs sandbox clean

# What measuring needs, and nothing else.
install: $(BENCH_STAMP)
	@echo "installed; source $(VENV)/bin/activate"

bench: $(BENCH_STAMP) sandbox
	@$(BIN)/python run.py fetch --suite $(SUITE)
	@$(BIN)/python run.py run --suite $(SUITE)

# A file is one process's, as its tests share models; in the order of the tree, because the files with
# the most tests are not those that take longest. All processes must collect the same tests: none may
# order a set of strings otherwise.
test: $(DEV_STAMP)
	@PYTHONHASHSEED=0 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile \
	  --no-loadscope-reorder

check: $(DEV_STAMP)
	@echo "ruff format"; $(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@echo "ruff check"; $(BIN)/ruff check --quiet .
	@echo "mypy"; $(BIN)/mypy --no-error-summary
	@echo "lint-imports"; $(BIN)/lint-imports --no-logo > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }
	@echo "codespell"; $(BIN)/codespell

format: $(DEV_STAMP)
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

# The manual; without a warning, or not at all.
docs: $(DEV_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/manual/index.html"

# HumanEval runs generated code in bubblewrap where there is one; without it, a second kind of
# sandbox takes over, so this may fail in silence.
sandbox:
	@command -v bwrap > /dev/null 2>&1 || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null 2>&1; then \
	  echo "installing bubblewrap"; \
	  DEBIAN_FRONTEND=noninteractive timeout 180 sh -c \
	    'apt-get install -y -qq bubblewrap || { apt-get update -qq && apt-get install -y -qq bubblewrap; }' \
	    > /dev/null 2>&1 || echo "bubblewrap could not be installed; going on without it"; \
	fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || \
	  { echo "tokenmark needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): is the venv module installed?"; exit 1; }

# pip says on the screen only what went wrong; all of it is in the log. setuptools is installed
# first and used directly, so that a complete .venv needs no network at all.
define install
	@echo "installing $(1) (the first time takes minutes)"
	@{ $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt 'setuptools>=77' && \
	   $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	     --no-build-isolation -e '$(1)'; } > $(LOG) 2>&1 || \
	  { tail -n 20 $(LOG); echo "installation failed; the whole log is $(LOG)"; exit 1; }
endef

$(BENCH_STAMP): | $(BIN)/python
	$(call install,.)
	@rm -f $(VENV)/.installed-* && touch $@

$(DEV_STAMP): | $(BIN)/python
	$(call install,.[dev])
	@rm -f $(VENV)/.installed-* && touch $(BENCH_STAMP) $@

clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
