# Each target sets up what it needs in .venv; nothing else on the machine changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo study bench gpu lint clean

test: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --dist loadgroup

demo: .venv/demo.stamp
	$(BIN)/python examples/align.py $(ARGS)

# Which objective, how many responses, online or offline? ARGS="--full", ARGS="--axes judge sft", ...
study: .venv/demo.stamp
	$(BIN)/python -m examples.study $(ARGS)

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
