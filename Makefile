# A fresh machine needs git, make and Python >= 3.11. Everything else goes into .venv.
# Another interpreter: make test PYTHON=python3.12 (read when .venv is made; `make clean` first to change it).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo figures report notebooks lab docs test test-slow test-all faults lint bench clean
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed ## see the idea at work on a small data set
	@$(BIN)/biasshift demo

figures: $(VENV)/.installed ## draw every figure that the committed tables allow
	@$(BIN)/biasshift figure all

report: runs $(VENV)/.installed ## one page about the runs below runs/, as report.html
	@$(BIN)/biasshift report runs -o report.html

runs:
	@echo "make: there are no runs in runs/ yet. 'make demo' makes some, in minutes; 'biasshift report FOLDER' is for runs elsewhere." >&2; exit 1

notebooks: $(VENV)/.installed-notebooks ## run the notebooks and keep their outputs
	@$(BIN)/python notebooks/execute.py notebooks/*.ipynb

lab: $(VENV)/.installed-notebooks ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

docs: $(VENV)/.installed-docs ## build the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "Documentation: site/index.html"

test: $(VENV)/.installed-test ## run the tests, but for those that take minutes
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed-test ## run the others: published models, fuzzing, statistics, simulated devices
	@$(BIN)/python -m pytest -n auto --dist loadfile -m slow

test-all: test test-slow ## run every test

faults: $(VENV)/.installed-test ## kill, damage, race and interrupt at length (half an hour on a quiet core)
	@$(BIN)/python -m tests.faults

lint: $(VENV)/.installed-dev ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: $(VENV)/.installed-bench ## compare speed and memory with other libraries (half an hour)
	@$(VENV)/bench/bin/python -m benchmarks

clean: ## remove .venv, caches and build outputs; data/ and runs/ stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# -- the environment: one stamp per set of extras, so that a second call installs nothing --------------------------

# $(1): the extras, with their brackets
define install
@ls -d $(VENV)/lib/python*/site-packages/torch >/dev/null 2>&1 \
  || echo "Installing into $(VENV): about 5 GB, nearly all of it PyTorch. This takes some minutes, once."
@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(1)'
@touch $(VENV)/.installed $@
endef

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(call install,)

$(VENV)/.installed-test: pyproject.toml $(VENV)/.created
	$(call install,[test])

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	$(call install,[dev])

$(VENV)/.installed-notebooks: pyproject.toml $(VENV)/.created
	$(call install,[notebooks])

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.created
	$(call install,[docs])

# The peers pin old versions of their own, some of a torch that no longer is: they get an environment, a constraint, and the
# first two no dependencies.
PEERS := $(VENV)/bench/bin/python -m pip install --quiet --disable-pip-version-check
$(VENV)/.installed-bench: pyproject.toml benchmarks/requirements.txt $(VENV)/.created
	@$(BIN)/python -m venv $(VENV)/bench
	@$(PEERS) -e .
	@$(VENV)/bench/bin/python -m pip freeze | grep -e '^torch==' -e '^torchvision==' > $(VENV)/bench/constraints.txt
	@grep -v -e asdfghjkl -e delve benchmarks/requirements.txt > $(VENV)/bench/some.txt
	@grep -e '^asdfghjkl' -e '^delve' benchmarks/requirements.txt > $(VENV)/bench/others.txt
	@$(PEERS) -c $(VENV)/bench/constraints.txt -r $(VENV)/bench/some.txt
	@$(PEERS) --no-deps -r $(VENV)/bench/others.txt
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'pass' 2>/dev/null || { echo "make: '$(PYTHON)' does not run. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: biasshift needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@touch $@
