# Promptyard. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUF_VERSION := 1.75.0
BUF := $(VENV)/node/node_modules/.bin/buf

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz soak chaos lint format proto bench bench-base-model bench-calibration bench-cascade bench-few-shot bench-prompts bench-publish bench-route bench-routing bench-scale bench-serving bench-statistics-only clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

install: $(INSTALLED)  ## Make .venv and install the package with its tools

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Watch the whole job happen: register, serve, route, answer, register live
	$(BIN)/promptyard demo

test: $(INSTALLED)  ## Run the tests (under ten minutes on two cores)
	$(BIN)/pytest --numprocesses=2 --dist=loadfile

fuzz: $(INSTALLED)  ## Try hostile input for long (the tests try it for short)
	$(BIN)/pytest --hypothesis-profile=fuzz --timeout=0 tests/unit/test_hostile_input.py

soak: $(INSTALLED)  ## A mixed load for 20 minutes while tasks come and go (the tests do it for seconds)
	$(BIN)/python -m tests.benchmarks.soak

chaos: $(INSTALLED)  ## Kill trainers and servers, 200 times and more (the tests do it less often)
	$(BIN)/python -m tests.benchmarks.chaos

lint: $(INSTALLED) $(BUF)  ## Format, lint, types, import contracts, proto, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BUF) lint proto
	proto/generate.sh $(VENV)/generated
	diff --recursive --exclude=__pycache__ router/v1 $(VENV)/generated/router/v1

format: $(INSTALLED)  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(INSTALLED)  ## Generate router/v1 from proto/
	proto/generate.sh

$(BUF): $(INSTALLED)
	npm install --prefix $(VENV)/node --no-audit --no-fund --silent @bufbuild/buf@$(BUF_VERSION)
	@touch $@

bench: bench-route bench-serving bench-routing bench-calibration bench-few-shot bench-base-model bench-prompts  ## Run the benchmarks (PROMPTYARD_BENCH_DATA for all but the first two)

bench-publish: $(INSTALLED)  ## Publishing the 11th task, and the 10,001st
	$(BIN)/python -m tests.benchmarks.bench_publish

bench-scale: $(INSTALLED)  ## Heads of 10 to 1,000,000 tasks (about 20 minutes, 12 GB of memory)
	$(BIN)/python tests/benchmarks/bench_scale.py --output docs/benchmarks

bench-cascade: $(INSTALLED)  ## What a cascade saves and loses, and what loading one takes
	$(BIN)/python -m tests.benchmarks.bench_cascade

bench-statistics-only: $(INSTALLED)  ## What keeping statistics only costs
	$(BIN)/python -m tests.benchmarks.bench_statistics_only

bench-route: $(INSTALLED)  ## What one Route call costs over the encoder and an empty gRPC call
	$(BIN)/python tests/benchmarks/bench_route.py

bench-calibration: $(INSTALLED)  ## How far the probability of being right is from the truth
	$(BIN)/python tests/benchmarks/bench_calibration.py

bench-routing: $(INSTALLED)  ## Routing of public data sets beside other ways to route (writes docs/benchmarks)
	$(BIN)/python -m tests.benchmarks.bench_routing

bench-serving: $(INSTALLED)  ## Calls, rates, answers and overload of a server under load (writes docs/benchmarks)
	$(BIN)/python -m tests.benchmarks.bench_serving $(if $(SEMANTIC_ROUTER),--semantic-router $(SEMANTIC_ROUTER))

bench-few-shot: $(INSTALLED)  ## What prompts tuned on few rows answer, by what they start from
	$(BIN)/python tests/benchmarks/bench_few_shot.py

bench-base-model: $(INSTALLED)  ## The base model on the 15-task benchmark (needs a GPU to be quick)
	$(BIN)/python tests/benchmarks/bench_base_model.py

bench-prompts: $(INSTALLED)  ## Prompts beside PEFT, LoRA, adapters and full fine-tuning (needs a GPU to be quick; writes docs/benchmarks)
	$(BIN)/python tests/benchmarks/bench_prompts.py --out build/bench_prompts.json
	$(BIN)/python tests/benchmarks/bench_prompts.py --merge build/bench_prompts.json

clean:  ## Remove what the targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
