# Each target makes .venv and installs requirements.txt by itself. `make demo` and `make test` are the first to try.
# PYTHON makes the environment, VENV is its folder: make test PYTHON=python3.12 VENV=.venv-latest
PYTHON ?= python3
VENV ?= .venv
export OMP_NUM_THREADS ?= 1

PYTEST := CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest -q
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder  # two workers, file by file, the longest first

.PHONY: demo test test-fast test-latest test-slurm soak conformance proofs check docs smollm2 bench bench-pairs bench-generate bench-ppo loc

demo: $(VENV)/ready  ## all stages on the built-in tiny model, two processes: losses, samples, scores
	$(VENV)/bin/python demo.py

test: $(VENV)/test  ## all tests, on the CPU
	$(PYTEST) $(IN_TWO) tests

test-fast: $(VENV)/test  ## tests without whole runs, on the CPU
	$(PYTEST) $(IN_TWO) -m "not slow and not gpu" tests

test-latest:  ## all tests with the newest Megatron-Core, on Python 3.12, in an environment of its own
	$(MAKE) test PYTHON=python3.12 VENV=.venv-latest

test-slurm: $(VENV)/test  ## the batch files on a real Slurm of two nodes, all on this machine: needs slurm-wlm
	$(PYTEST) tests/real_slurm.py

soak: $(VENV)/test  ## 100 kill -9 at random moments over all scripts, about 40 minutes: SOAK_KILLS=N for others
	$(PYTEST) -s tests/training/soak.py

conformance: $(VENV)/ready  ## docs/conformance.md: layouts and algorithms against one process and float64
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m tools.conformance --planted --page docs/conformance.md

proofs: conformance $(VENV)/test  ## docs/proofs.md: conformance, planted differences, replays, the ledger over 10 kills, the museum
	$(PYTEST) $(IN_TWO) tests/museum tests/tools/test_check.py tests/tools/test_replay.py tests/training/test_ledger.py
	RESUME_KILLS=10 $(PYTEST) tests/training/test_resume.py -k "ends_like and ppo and not lora"

check: $(VENV)/ready  ## format, lint, types
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

docs: $(VENV)/docs  ## the documentation, into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

smollm2: $(VENV)/ready  ## SmolLM2-135M-Instruct as a Hugging Face directory, models/smollm2-135m-instruct
	$(VENV)/bin/python -m tools.smollm2 --output models/smollm2-135m-instruct

bench: $(VENV)/bench smollm2  ## SFT against TRL: make bench DATA=rows.jsonl
	@test -n "$(DATA)" || (echo "make bench DATA=rows.jsonl: rows of {\"messages\": [...]}; see docs/benchmarks.md" && exit 2)
	$(VENV)/bin/python bench/sft.py --data $(DATA) --dtype fp32
	$(VENV)/bin/python bench/sft.py --data $(DATA) --dtype bf16

bench-pairs: $(VENV)/bench smollm2  ## DPO and reward model against TRL: make bench-pairs DATA=pairs.jsonl
	@test -n "$(DATA)" || (echo "make bench-pairs DATA=pairs.jsonl: rows of prompt, chosen, rejected; see docs/benchmarks.md" && exit 2)
	$(VENV)/bin/python bench/dpo.py --data $(DATA)
	$(VENV)/bin/python bench/rm.py --data $(DATA)

bench-generate: $(VENV)/ready smollm2  ## sampling against transformers: make bench-generate DATA=prompts.jsonl
	@test -n "$(DATA)" || (echo "make bench-generate DATA=prompts.jsonl: 64 rows of prompts or more; see docs/benchmarks.md" && exit 2)
	$(VENV)/bin/python bench/generate.py --data $(DATA) --dtype fp32
	$(VENV)/bin/python bench/generate.py --data $(DATA) --dtype bf16

bench-ppo: $(VENV)/trl-ppo/trl smollm2  ## PPO and GRPO against TRL: make bench-ppo DATA=prompts.jsonl
	@test -n "$(DATA)" || (echo "make bench-ppo DATA=prompts.jsonl: rows of {\"prompt\": [messages]}; see docs/benchmarks.md" && exit 2)
	$(VENV)/bin/python bench/ppo.py --data $(DATA) --trainer ppo --samples 16 --trl-ppo $(VENV)/trl-ppo
	$(VENV)/bin/python bench/ppo.py --data $(DATA) --trainer grpo

loc:  ## lines of code, by file
	python3 tools/loc.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test: $(VENV)/ready tests/requirements.txt
	$(VENV)/bin/pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@

$(VENV)/docs: docs/requirements.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r docs/requirements.txt
	touch $@

$(VENV)/bench: $(VENV)/ready bench/requirements.txt
	$(VENV)/bin/pip install --quiet -r requirements.txt -r bench/requirements.txt
	touch $@

$(VENV)/trl-ppo/trl: $(VENV)/bench  # the last release with a PPO trainer
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $(VENV)/trl-ppo trl==1.10.0
	touch $@
