# make search: set up and run the main job; make test: set up, check and test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: search test test-system lint verify-backends benchmark clean

search: $(READY)
	$(BIN)/bitplan search $(ARGS)

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not backend and not system" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Slurm, PostgreSQL and Chromium for real; .ci/run installs them.
test-system: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "system and not slow" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each backend whose packages pin others is asked in an environment of its own: .venvs/EXTRA.
ENVIRONMENTS := compressed-tensors gptqmodel auto-round modelopt brevitas nncf aimet coreml litert executorch llamacpp

verify-backends: $(READY) $(addprefix verify-,$(ENVIRONMENTS))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m backend tests/test_backend_x86inductor.py tests/test_backend_matmulnbits.py tests/test_backend_tensorrt.py

verify-%:
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/pip install --quiet --upgrade "pip>=25.1"
	.venvs/$*/bin/pip install --quiet --constraint constraints-backends.txt torch
	.venvs/$*/bin/pip install --quiet --constraint constraints-backends.txt --editable ".[$*]" --group test
	.venvs/$*/bin/python tests/backends_of.py $* | OMP_NUM_THREADS=1 xargs .venvs/$*/bin/python -m pytest -m backend

benchmark: $(READY)
	$(BIN)/python experiments/engine/forward.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	touch $@

clean:
	rm -rf $(VENV) .venvs build dist .pytest_cache .mypy_cache .ruff_cache
