# Every target sets up .venv by itself and reuses it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-upstream test-scale check format bench golden clean

demo: $(INSTALLED)  ## vocabulary, corpus, short pretraining, embedding, table, two pictures
	$(BIN)/python examples/quickstart.py

test: $(INSTALLED)  ## the fast tests
	$(BIN)/python -m pytest

test-all: $(INSTALLED)  ## the slow ones too
	$(BIN)/python -m pytest -m "not upstream and not gpu and not scale"

test-upstream: $(INSTALLED)  ## transformers' own model tests, fetched from its source distribution
	$(BIN)/python -m pytest -m upstream tests/upstream

test-scale: $(INSTALLED)  ## corpora through Ray and from SOMA experiments; installs the extras ray and census
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray,census]"
	$(BIN)/python -m pytest -m scale

check: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## speed of every stage beside its peer; STAGE=ranking for one, DATA="a.h5ad ..." for real files
	$(BIN)/python benchmarks/run_speed.py $(STAGE) $(if $(DATA),--data $(DATA))

golden: $(INSTALLED)  ## write the frozen numbers of tests/golden anew; say why in the changelog
	$(BIN)/python -m pytest tests/test_golden.py --write-golden

clean:
	rm -rf $(VENV) demo scdiva .cache

# torch comes first and pinned: left to the others, pip may fetch a newer build with gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
