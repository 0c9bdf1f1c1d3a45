# Each target sets up what it needs in .venv; nothing else on the machine changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test test-slow test-transformers demo bench gpu lint clean

test: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --dist loadgroup

# Commands as the pages print them; minutes each.
test-slow: .venv/test.stamp .venv/demo.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

# The adapter on the oldest and the newest release of transformers that it is known to work with.
test-transformers: .venv/transformers-5.0.0 .venv/transformers-5.24.0
	for release in $^; do PYTHONPATH=$$release $(BIN)/python -m pytest tests/test_transformers.py || exit 1; done

.venv/transformers-%: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ transformers==$*

demo: .venv/demo.stamp
	$(BIN)/python examples/align.py $(ARGS)

# On a GPU full sizes, elsewhere small ones. ARGS="--smoke", ARGS='-k "Qwen3 and pair"', ...; peers are measured where installed.
bench: .venv/test.stamp
	$(BIN)/python -m pytest benchmarks/bench.py $(ARGS)

# Needs no .venv: torch, triton and pytest of the machine.
gpu:
	benchmarks/gpu.sh $(ARGS)

lint: .venv/test.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check rpo_kernels tests examples benchmarks

.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
