# Each target sets up what it needs in .venv; nothing else on the machine changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test check test-slow test-transformers demo study docs notebook
.PHONY: bench gpu sanitize lint clean

test: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --dist loadgroup

# For the minutes between two edits: lint, and the quick tests without Triton's interpreter.
QUICK := tests/evidence/test_architecture.py $(filter-out \
	%_vocabulary.py %_real_inputs.py %_gemm_work.py, $(wildcard tests/unit/test_*.py))

check: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup -k "not triton" $(QUICK) $(ARGS)

# Commands as the pages print them; minutes each.
test-slow: .venv/test.stamp .venv/demo.stamp .venv/docs.stamp .venv/notebook.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

# The adapter on the oldest and the newest release of transformers that it is known to work with.
test-transformers: .venv/transformers-5.0.0 .venv/transformers-5.24.0
	for release in $^; do PYTHONPATH=$$release $(BIN)/python -m pytest tests/adapters/test_transformers.py || exit 1; done

.venv/transformers-%: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ transformers==$*

demo: .venv/demo.stamp
	$(BIN)/python examples/align.py $(ARGS)

# Which objective, how many responses, online or offline? ARGS="--full", ARGS="--axes judge sft", ...
study: .venv/demo.stamp
	$(BIN)/python -m examples.study $(ARGS)

# The site, from docs/, CONTRIBUTING and docstrings, into site/. A warning is an error.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Runs the code of docs/start.md: examples/start.ipynb, and the outputs on the page.
notebook: .venv/notebook.stamp
	$(BIN)/python docs/tools/start.py

# On a GPU full sizes, elsewhere small ones. ARGS="--smoke", ARGS='-k "Qwen3 and pair"', ...; peers are measured where installed.
bench: .venv/test.stamp
	$(BIN)/python -m pytest benchmarks/bench.py $(ARGS)

# Needs no .venv: torch, triton and pytest of the machine.
gpu:
	benchmarks/gpu.sh $(ARGS)

# Every kernel's accesses, checked without a GPU, in 2 minutes. ARGS="--only split odd", ...
sanitize: .venv-sanitize/stamp
	.venv-sanitize/bin/python -m tests.evidence.sanitize $(ARGS)

# ttsem asks for newer Pythons, torch and triton than ours, and runs on ours (Python >= 3.11).
.venv-sanitize/stamp: PIP := .venv-sanitize/bin/python -m pip --disable-pip-version-check --quiet
.venv-sanitize/stamp: TTSEM := ttsem-0.1.0-py3-none-any.whl
.venv-sanitize/stamp: constraints.txt
	test -x .venv-sanitize/bin/python || $(PYTHON) -m venv .venv-sanitize
	$(PIP) install -c constraints.txt torch triton numpy
	$(PIP) download --no-deps --python-version 3.13 --dest .venv-sanitize ttsem==0.1.0
	$(PIP) install --no-deps --ignore-requires-python .venv-sanitize/$(TTSEM)
	touch $@

lint: .venv/test.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check rpo_kernels tests examples benchmarks
	$(BIN)/mypy

.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-sanitize build dist site *.egg-info
