# Each target makes .venv and installs requirements.txt by itself. `make demo` and `make test` are the first to try.
PYTHON := .venv/bin/python
export OMP_NUM_THREADS ?= 1

PYTEST := CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest -q
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder  # two workers, file by file, the longest first

.PHONY: demo test test-fast test-slurm soak check docs smollm2 bench bench-pairs bench-generate bench-ppo loc

demo: .venv/ready  ## all stages on the built-in tiny model, two processes: losses, samples, scores
	$(PYTHON) demo.py

test: .venv/test  ## all tests, on the CPU
	$(PYTEST) $(IN_TWO) tests

test-fast: .venv/test  ## tests without whole runs, on the CPU
	$(PYTEST) $(IN_TWO) -m "not slow and not gpu" tests

test-slurm: .venv/test  ## the batch files on a real Slurm of two nodes, all on this machine: needs slurm-wlm
	$(PYTEST) tests/real_slurm.py

soak: .venv/test  ## 100 kill -9 at random moments over all scripts, about 40 minutes: SOAK_KILLS=N for others
	$(PYTEST) -s tests/training/soak.py

check: .venv/ready  ## format, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

docs: .venv/docs  ## the documentation, into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

smollm2: .venv/ready  ## SmolLM2-135M-Instruct as a Hugging Face directory, models/smollm2-135m-instruct
	$(PYTHON) -m tools.smollm2 --output models/smollm2-135m-instruct

bench: .venv/bench smollm2  ## SFT against TRL: make bench DATA=rows.jsonl
	@test -n "$(DATA)" || (echo "make bench DATA=rows.jsonl: rows of {\"messages\": [...]}; see docs/benchmarks.md" && exit 2)
	$(PYTHON) bench/sft.py --data $(DATA) --dtype fp32
	$(PYTHON) bench/sft.py --data $(DATA) --dtype bf16

bench-pairs: .venv/bench smollm2  ## DPO and reward model against TRL: make bench-pairs DATA=pairs.jsonl
	@test -n "$(DATA)" || (echo "make bench-pairs DATA=pairs.jsonl: rows of prompt, chosen, rejected; see docs/benchmarks.md" && exit 2)
	$(PYTHON) bench/dpo.py --data $(DATA)
	$(PYTHON) bench/rm.py --data $(DATA)

bench-generate: .venv/ready smollm2  ## sampling against transformers: make bench-generate DATA=prompts.jsonl
	@test -n "$(DATA)" || (echo "make bench-generate DATA=prompts.jsonl: 64 rows of prompts or more; see docs/benchmarks.md" && exit 2)
	$(PYTHON) bench/generate.py --data $(DATA) --dtype fp32
	$(PYTHON) bench/generate.py --data $(DATA) --dtype bf16

bench-ppo: .venv/trl-ppo/trl smollm2  ## PPO and GRPO against TRL: make bench-ppo DATA=prompts.jsonl
	@test -n "$(DATA)" || (echo "make bench-ppo DATA=prompts.jsonl: rows of {\"prompt\": [messages]}; see docs/benchmarks.md" && exit 2)
	$(PYTHON) bench/ppo.py --data $(DATA) --trainer ppo --samples 16 --trl-ppo .venv/trl-ppo
	$(PYTHON) bench/ppo.py --data $(DATA) --trainer grpo

loc:  ## lines of code, by file
	python3 tools/loc.py

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/test: .venv/ready tests/requirements.txt
	.venv/bin/pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@

.venv/docs: docs/requirements.txt
	test -d .venv || python3 -m venv .venv
	.venv/bin/pip install --quiet -r docs/requirements.txt
	touch $@

.venv/bench: .venv/ready bench/requirements.txt
	.venv/bin/pip install --quiet -r requirements.txt -r bench/requirements.txt
	touch $@

.venv/trl-ppo/trl: .venv/bench  # the last release with a PPO trainer
	.venv/bin/pip install --quiet --no-deps --upgrade --target .venv/trl-ppo trl==1.10.0
	touch $@
