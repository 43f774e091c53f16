# Everything needs only Python 3.11+, make and git: the first target that wants the environment makes it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

# Two cores, and most of a test's time is waiting for a server: four workers keep both busy.
WORKERS ?= 4
PYTEST_ARGS ?=

# Thousands of tests with real servers share two cores with their machine's other work: what has failed among the others
# is looked at once more by itself. Both outcomes are printed, and what fails alone has failed.
SECOND_LOOK := $(BIN)/python -m pytest -n 0 --last-failed --last-failed-no-failures none $(PYTEST_ARGS)

TYPED := meshlb tests/support $(wildcard examples)

.PHONY: demo test check bench proto clean install format

install: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "meshlb needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/meshlb demo

test: $(READY)
	$(BIN)/python -m tests.support.consul_binary
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) || { echo "--- failed above; now alone:"; $(SECOND_LOOK); }

# lint-imports --no-cache: its cache keeps an import unresolved after the module has come to be.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(TYPED)
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks

# The demo's and the tests' gRPC service. See proto/README.md for why it is made with old tools.
PROTO_VENV := .cache/proto-venv

$(PROTO_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.62.3' 'mypy-protobuf==3.6.0' 'setuptools<80'
	@touch $@

proto: $(PROTO_VENV)/.installed
	PATH="$(PROTO_VENV)/bin:$$PATH" $(PROTO_VENV)/bin/python -m grpc_tools.protoc \
		--proto_path=meshlb/_proto=proto/meshlb/demo/v1 \
		--python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
		meshlb/_proto/echo.proto

clean:
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
