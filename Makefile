# One command for everything; CI runs the same. PYTHON: the interpreter that makes the environment (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := core kernels runtime plugins cli
DEMO_ENGINE := out/tiny-opt-engine

.PHONY: demo test test-all lint format bench docs wheel size clean

$(VENV)/installed: setup.py pyproject.toml $(wildcard kernels/cpu_step/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,serve,mpi,cuda,tensorrt-rtx]'
	mkdir -p $(VENV)/mypy && ln -sfn "$(CURDIR)" $(VENV)/mypy/trtc
	touch $@

## build the tiny OPT's engine and let it summarize held-out articles beside transformers
demo: $(VENV)/installed
	$(BIN)/trtc build --model opt --model-dir examples/tiny-opt --dtype float32 --output-dir $(DEMO_ENGINE)
	$(BIN)/trtc summarize --engine-dir $(DEMO_ENGINE) --hf-model-dir examples/tiny-opt --test-trtc --test-hf \
		--batch-size 4 --max-ite 3 --check-accuracy --rouge1-threshold 90

## all tests that run without an accelerator; those with servers, ranks and kills in processes of their own
PYTEST := $(BIN)/python -m pytest -q -m "not gpu and not multi_gpu and not tensorrt"
test: $(VENV)/installed
	$(PYTEST) tests/cli/test_kill.py
	$(PYTEST) -n auto --dist loadfile tests --ignore tests/cli --ignore tests/runtime --ignore tests/server
	$(PYTEST) -n auto --dist loadfile tests/runtime tests/server
	$(PYTEST) -n auto --dist loadfile tests/cli --ignore tests/cli/test_kill.py

## formatting, lint, types, layering
lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd $(VENV)/mypy && MYPYPATH="$(CURDIR)/$(VENV)/mypy" ../bin/python -m mypy --config-file "$(CURDIR)/pyproject.toml" \
		$(foreach room,$(ROOMS),-p trtc.$(room))
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## time the tiny OPT on the CPU and, where there is a GPU, every kernel; tables on stdout, samples in out/
bench: $(VENV)/installed
	$(BIN)/trtc build --model-dir examples/tiny-opt --dtype float32 --output-dir $(DEMO_ENGINE)
	$(BIN)/trtc bench --engine-dir $(DEMO_ENGINE) --batch 1 8 --input-len 128 --output-len 64 --json out/bench-cpu.json
	if command -v nvidia-smi > /dev/null; then \
		$(BIN)/python -m trtc.bench.kernels.dense && $(BIN)/python -m trtc.bench.kernels.attention; fi

## regenerate the generated parts of docs/
docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python bench/table.py
	$(BIN)/python -m trtc.bench.server_tables
	$(BIN)/python -m trtc.bench.rank_memory --table
	$(BIN)/python bench/prompt_lookup.py

wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir out/wheels .

## lines of code by room
size:
	@for room in $(ROOMS) examples tests bench; do \
		printf '%-9s %6d lines\n' $$room $$(git ls-files "$$room/*.py" "$$room/*.cu" "$$room/*.cuh" | xargs cat | wc -l); done

clean:
	rm -rf out build dist *.egg-info
