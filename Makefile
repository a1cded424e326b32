# `make demo` and `make test` do everything on a fresh machine: each makes .venv if there is none.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   VENV=/path/to/venv  an environment elsewhere
#   PIP_ARGS=...        passed on to pip, for example an index of CPU-only builds of torch
#   PYTEST_ARGS=...     passed on to pytest, for example PYTEST_ARGS="-x tests/data"
#
# `make test-lowest`, `make test-newest` and `make test-bare` make .venv-lowest and so on, by uv:
#
#   LOWEST_PYTHON, NEWEST_PYTHON, BARE_PYTHON   their interpreters
#   UV_ARGS=...         passed on to uv, for example UV_ARGS="--torch-backend cpu"

PYTHON ?= python3
LOWEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13
BARE_PYTHON ?= $(PYTHON)
VENV ?= .venv
# A worker takes two gigabytes.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); test $$cores -lt 8 || cores=8; echo $$cores)
# Of the examples of `make test-properties`.
SEED := $(or $(SEED),$(shell date +%s))

# Windows has its own name for it.
BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# A step that is done leaves a stamp, and is done again when what it was made from changes.
READY = $(VENV)/.ready
READY_TO_TEST = $(VENV)/.ready-to-test

SAY_SIZE = @echo 'Installing torch, Diffusers and the rest into $(@D), once. On Linux, torch comes with' \
	'gigabytes for NVIDIA GPUs; without one, stop, and start again with' \
	'PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests' models are tiny: threads of several workers would only wait for each other. What Python
# has compiled is kept, whatever the shell says: workers would compile the tests anew in each run.
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=

# In parts, and each failure once more: see tests/suite.py.
SUITE = -m tests.suite -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: demo docs test test-lab test-portable test-slow test-docs test-properties test-lowest test-newest test-bare
.PHONY: lint format dist clean

demo: $(READY)
	$(BIN)/python -m dora_diffusion demo $(DEMO_ARGS)

# The site, into build/docs: strict, and without a network.
docs: $(READY_TO_TEST)
	$(BIN)/python -m sphinx -W --keep-going -n -q -E -b html docs build/docs
	@echo 'Open build/docs/index.html'

test: lint
	$(TEST_ENV) $(BIN)/python $(SUITE)

# What nothing that ships needs: the laboratory, benchmarks, tools, and the suite itself.
test-lab: $(READY_TO_TEST)
	$(TEST_ENV) $(BIN)/python $(SUITE) lab/tests

# What touches files, processes and folders, where what Windows has not is gone: see
# tests/portable/windows.py. PORTABLE_TESTS=tests runs all of them so, in about three times the time.
PORTABLE = $(TEST_ENV) PYTHONPATH='$(CURDIR)/tests/portable' $(BIN)/python $(SUITE)
PORTABLE_TESTS ?= tests/portable tests/test_system.py tests/cli/console tests/formats/files \
	tests/integration/test_any_folder.py tests/cli/commands/test_app.py tests/cli/commands/test_samples.py \
	tests/export/test_files.py tests/data/test_photos.py tests/training/results/test_folders.py \
	$(filter-out $(PORTABLE_LONG), $(wildcard tests/studio/jobs/test_*.py))
PORTABLE_LONG = tests/studio/jobs/test_worker.py tests/studio/jobs/test_image_generator.py tests/studio/app/test_serve.py \
	tests/cli/commands/test_train.py tests/data/test_dataset.py tests/export/test_checkpoint.py \
	tests/training/results/test_checkpoint.py tests/training/test_metrics.py tests/training/test_signals.py
test-portable: $(READY_TO_TEST)
	$(PORTABLE) $(PORTABLE_TESTS)

# Longer proofs: every combination where `make test` takes a diagonal, and the figures of what ships.
test-slow: $(READY_TO_TEST)
	$(TEST_ENV) $(BIN)/python $(SUITE) -m slow
	$(TEST_ENV) $(BIN)/python $(SUITE) -m slow lab/tests
	$(PORTABLE) $(PORTABLE_LONG)

# The same tests with the lowest versions that pyproject.toml states, with the newest that there
# are, and without one optional library.
test-lowest: $(VENV)-lowest/.ready
	$(TEST_ENV) $(VENV)-lowest/bin/python $(SUITE)

test-newest: $(VENV)-newest/.ready
	$(TEST_ENV) $(VENV)-newest/bin/python $(SUITE)

test-bare: $(VENV)-bare/.ready
	$(TEST_ENV) $(VENV)-bare/bin/python $(SUITE)

# All of README and site: every block runs, every page is looked at in a browser, the search answers.
test-docs: $(READY_TO_TEST)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m '' tests/docs $(PYTEST_ARGS)

# Property tests with 10,000 examples each, other ones in every run; `make test` tries the same few
# each time. A failure prints its example, and a line that repeats it.
test-properties: $(READY_TO_TEST)
	@echo 'SEED=$(SEED) repeats this run'
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m hypothesis --hypothesis-profile=long \
		--hypothesis-seed=$(SEED) --verbose $(PYTEST_ARGS)

lint: $(READY_TO_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python -m tools.rules

format: $(READY_TO_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The files of a release. They are built twice, and the two wheels must be one to the last byte.
# TAG=v1.2.3 must be the version's.
dist: $(READY)
	test -z "$(TAG)" || test "$(TAG)" = "v$$($(BIN)/python -m dora_diffusion --version)"
	rm -rf dist build/again
	$(BIN)/python -m pip install "build>=1.2"
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --outdir build/again
	cmp dist/*.whl build/again/*.whl

$(READY): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(SAY_SIZE)
	$(BIN)/python -m pip install $(PIP_ARGS) --editable .
	touch $@

$(READY_TO_TEST): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(SAY_SIZE)
	$(BIN)/python -m pip install $(PIP_ARGS) --editable ".[test,lint]"
	touch $(READY) $@

$(VENV)-lowest/.ready: INTERPRETER = $(LOWEST_PYTHON)
$(VENV)-lowest/.ready: INSTALLED = --resolution lowest-direct --editable ".[test]"
$(VENV)-newest/.ready: INTERPRETER = $(NEWEST_PYTHON)
$(VENV)-newest/.ready: INSTALLED = --editable ".[test]"
$(VENV)-bare/.ready: INTERPRETER = $(BARE_PYTHON)
$(VENV)-bare/.ready: INSTALLED = --editable ".[bare-test]"

# Made anew each time: what an environment holds already would be kept.
$(VENV)-lowest/.ready $(VENV)-newest/.ready $(VENV)-bare/.ready: pyproject.toml setup.py
	$(INTERPRETER) -m venv --clear $(@D)
	$(SAY_SIZE)
	$(@D)/bin/python -m pip install uv
	$(@D)/bin/uv pip install --python $(@D)/bin/python $(INSTALLED) $(UV_ARGS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-bare build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
