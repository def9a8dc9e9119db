# Figure 2 of the paper as targets: each stage depends on the checkpoint that it starts from.
# `make` trains everything on the built-in world and writes out/report.md; `make paper` goes on with the paper's experiments;
# `make test` runs the tests, `make lint` checks the style; `make bench` measures speed and memory beside others; `make gpu`
# checks a GPU. Each sets up .venv first.
# PYTHON=python3.12 make ... chooses another Python (3.11 or newer).

PYTHON ?= python3
RUN = .venv/bin/python
# Another seed, beside the first: make SEED=1 DATA=out/seed1/data OUT=out/seed1
SEED = 0
DATA = data/tinyworld
OUT = out
WHERE = --data $(DATA) --seed $(SEED)
SFT = $(OUT)/sft/model.pt

report: $(OUT)/report.md
data: $(DATA)/tokenizer.json
base: $(OUT)/base/model.pt
sft: $(SFT)
comparisons: $(DATA)/comparisons.train.jsonl
reward: $(OUT)/reward/model.pt
ppo: $(OUT)/ppo/model.pt $(OUT)/ppo_noptx/model.pt

# Threads that wait for each other spin for 0.1 ms, then sleep. By default they spin for milliseconds, and next to one other
# busy process training would become three times as slow (docs/speed.md).
export GOMP_SPINCOUNT ?= 3000

# A stage is made again only if what it starts from is newer. Editing code does not throw away what was trained with
# it; `make clean` does.
$(DATA)/tokenizer.json: | .venv/installed
	$(RUN) data/tinyworld/prepare.py --out $(DATA) --seed $(SEED)

$(OUT)/base/model.pt: $(DATA)/tokenizer.json
	$(RUN) sft.py @data/tinyworld/base.args $(WHERE) --out $(OUT)/base

$(SFT): $(OUT)/base/model.pt
	$(RUN) sft.py $(WHERE) --init $(OUT)/base/model.pt --out $(OUT)/sft

$(DATA)/comparisons.train.jsonl: $(SFT)
	$(RUN) data/collect.py $(WHERE) --no-append \
	    --sources $(SFT)@0.5,$(SFT)@1,$(SFT)@1,$(SFT)@1,$(SFT)@1.4,$(OUT)/base/model.pt@1

$(OUT)/reward/model.pt: $(DATA)/comparisons.train.jsonl
	$(RUN) reward.py $(WHERE) --init $(SFT) --out $(OUT)/reward

# The two policies are trained side by side, each on half of the cores, which is faster than one after the other on all.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j2
endif
CORES = $(shell getconf _NPROCESSORS_ONLN)
PPO = OMP_NUM_THREADS=$$((($(CORES) + 1) / 2)) $(RUN) ppo.py $(WHERE) --policy $(SFT) --reward $(OUT)/reward/model.pt

$(OUT)/ppo/model.pt: $(OUT)/reward/model.pt
	$(PPO) --save_every 26 --out $(OUT)/ppo

$(OUT)/ppo_noptx/model.pt: $(OUT)/reward/model.pt
	$(PPO) --save_every 26 --ptx_coef 0 --out $(OUT)/ppo_noptx

$(OUT)/report.md: $(OUT)/ppo/model.pt $(OUT)/ppo_noptx/model.pt
	$(RUN) evaluate.py $(WHERE) --out $(OUT)

include paper/experiments.mk

test: .venv/tests-installed
	$(RUN) -m pytest -q -n 2 tests

# Lines of teaching code have at most 100 columns, all others 150 (pyproject.toml).
TEACHING = model.py sft.py reward.py ppo.py
lint: .venv/tests-installed
	$(RUN) -m ruff check
	$(RUN) -m ruff check --select E501 --line-length 100 $(TEACHING)

bench: .venv/bench-installed
	$(RUN) tests/bench.py $(if $(QUICK),--quick)

gpu: .venv/installed
	$(RUN) tests/gpu.py

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: PYTHON=python3.12 make")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/tests-installed: .venv/installed tests/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

.venv/bench-installed: .venv/tests-installed tests/bench-requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt \
	    -r tests/bench-requirements.txt
	touch $@

clean:
	rm -rf $(OUT) $(DATA)/*.bin $(DATA)/*.jsonl $(DATA)/*.part $(DATA)/tokenizer.json

.PHONY: report data base sft comparisons reward ppo paper runs test lint bench gpu clean
