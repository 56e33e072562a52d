# Every task of the project, one line each. `make demo` and `make test` set up all they need.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PACKAGES := protocol mmdit diloco verify worker coordinator commonweight

.PHONY: demo test lint format bench wire docs clean

demo: .venv
	$(BIN)/commonweight demo

test: .venv  # for two cores; whole runs apart and last: they are few and long, and often wait for their own processes
	$(PYTEST) -n 2 --dist loadfile --ignore tests/integration
	$(PYTEST) -n 3 --dist worksteal tests/integration

lint: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv
	$(BIN)/python -m benchmarks

wire: .venv  # regenerate the gRPC code from protocol/wire/coordinator.proto
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. \
	  --mypy_out=. --mypy_grpc_out=. protocol/wire/coordinator.proto

docs: .venv  # rewrite the generated parts of docs/
	$(BIN)/python -m docs.generate

.venv: pyproject.toml constraints.txt
	@echo "setting up .venv: this fetches some packages and takes a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[data,demo,dev,encoders]'
	touch .venv

clean:
	rm -rf .venv demo-run* demo-output* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
