# `make demo` and `make test` create .venv and install this project into it first.
PYTHON ?= python3
DEMO_FOLDER := build/demo
# Without a GPU, all experts are in host memory; with one, more memory than its driver takes.
DEMO_GPU_MEM ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 2GB || echo 0GB)
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/fiddler-opt profile --quick --force --model examples/tiny-mixtral --profiles $(DEMO_FOLDER)
	$(BIN)/fiddler-opt plan --model examples/tiny-mixtral --profiles $(DEMO_FOLDER) --gpu-mem $(DEMO_GPU_MEM) \
		--prompt-tokens 16 --output-tokens 112 --max-seq-len 512 -o $(DEMO_FOLDER)/plan.yaml
	$(BIN)/fiddler-run --plan $(DEMO_FOLDER)/plan.yaml "Once upon a time"
	@echo; echo "Mixtral-8x7B on an RTX 4090, predicted from data sheets:"
	$(BIN)/fiddler-opt plan --machine profiles/rtx4090.machine.yaml --gpu-mem 24GB -o $(DEMO_FOLDER)/rtx4090.yaml

test: .venv/installed lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

# constraints.txt holds the tested versions. PyTorch comes first, or the others would choose its version.
.venv/installed: pyproject.toml constraints.txt $(wildcard runtime/fiddler_run/*/*.cpp runtime/fiddler_run/*/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
