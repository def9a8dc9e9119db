# The experiments of section 4 and appendix E: which runs there are, with which flags, and what is measured of them.
# `make paper` trains and measures what is missing, two at a time, each on half of the cores (so leave -j out), and writes
# out/paper/report.md.
#
# A run is a folder SIZE-SEED/RUN below out/paper, laptop-1/ppo say. All runs share the default run's dataset and
# comparisons; a seed trains everything anew on them: base, SFT, reward model, policies. laptop-0 is the default run.

P = $(OUT)/paper
SEEDS = 0 1 2

# ---------------------------------------------------------------- what is run

# Sizes of 1 : 5 : 22 in parameters. The largest is trained with one seed only: it takes longer than all others.
ALL = desktop-0 $(SEEDS:%=laptop-%) $(SEEDS:%=pocket-%)
# The larger the model, the smaller the learning rate, as in GPT-3. (Of 5e-4, 1e-3 and 2e-3 the second learned fastest.)
base-desktop = --lr 1e-3
sft-desktop = --lr 4e-4
ppo-desktop = --lr 1.5e-4

# Policies, by the folder's name. The first two are the default run's.
flags-ppo = --save_every 26
flags-ppo_noptx = --ptx_coef 0 --save_every 26
flags-ppo_ptx0.1 = --ptx_coef 0.1
flags-ppo_ptx2.5 = --ptx_coef 2.5
flags-ppo_kl0.02 = --ptx_coef 0 --beta 0.02
flags-ppo_kl0.5 = --ptx_coef 0 --beta 0.5
flags-ppo_kl2 = --ptx_coef 0 --beta 2
flags-ppo_long = --ptx_coef 0 --iterations 390 --save_every 39
flags-ppo_long_kl0 = --ptx_coef 0 --iterations 390 --save_every 39 --beta 0

COEFFICIENTS = ppo_ptx0.1 ppo_ptx2.5 ppo_kl0.02 ppo_kl0.5 ppo_kl2
OPTIMIZED = ppo_long ppo_long_kl0
PUBLIC = flan t0
FOLDS = 0 1 2 3 4
ROUNDS = 2 3

# Checkpoints of a run that are kept beside its last.
TRAINING = 26 52 78 104
OPTIMIZING = 39 78 156 273
EPOCHS = 1 2 3 4
LONG_EPOCHS = 1 2 4 8 12

# ---------------------------------------------------------------- what is measured

MEASURED = \
  $(foreach g,$(ALL),$(foreach r,base/model base/prompted sft/model ppo/model ppo_noptx/model,$(g)/$(r))) \
  $(foreach r,$(ROUNDS),laptop-0/round$(r)_ppo/model) \
  $(foreach r,$(PUBLIC),$(EPOCHS:%=desktop-0/$(r)/epoch%)) \
  $(foreach s,$(SEEDS),$(foreach n,$(TRAINING),laptop-$(s)/ppo/iteration$(n) laptop-$(s)/ppo_noptx/iteration$(n)) \
    $(COEFFICIENTS:%=laptop-$(s)/%/model)) \
  $(foreach s,$(SEEDS),laptop-$(s)/sft16/model $(LONG_EPOCHS:%=laptop-$(s)/sft16/epoch%) \
    $(foreach r,$(OPTIMIZED),laptop-$(s)/$(r)/model $(OPTIMIZING:%=laptop-$(s)/$(r)/iteration%)) laptop-$(s)/bestof)

$(if $(filter paper,$(MAKECMDGOALS)),$(if $(filter-out 0,$(SEED)),$(error make paper trains the seeds $(SEEDS) itself; leave SEED out)))

paper: report  # which trains on all cores, so it comes first
	$(MAKE) $(P)/report.md

$(P)/report.md: $(FOLDS:%=$(P)/laptop-0/fold%/model.pt) $(MEASURED:%=$(P)/measured/%.json)
	$(RUN) paper/report.py --data $(DATA) --out $(P)

# ---------------------------------------------------------------- how

# All that is trained. (To name a file keeps make from taking it for a mere step in between, which it may delete or do without.)
runs: $(patsubst %,$(P)/%.pt,$(filter-out %/prompted %/bestof,$(MEASURED))) $(SEEDS:%=$(P)/laptop-%/reward/model.pt)

.SECONDEXPANSION:
group = $(firstword $(subst /, ,$*))
size = $(firstword $(subst -, ,$(group)))
seed = $(lastword $(subst -, ,$(group)))
# How a script is started, on half of the cores, and what every stage is told.
HALF = OMP_NUM_THREADS=$$((($(CORES) + 1) / 2)) $(RUN)
FROM = --data $(DATA) --seed $(seed) --out $(@D)

DEFAULT = base sft reward ppo ppo_noptx
$(DEFAULT:%=$(P)/laptop-0/%/model.pt): $(P)/laptop-0/%/model.pt: $(OUT)/%/model.pt
	mkdir -p $(P)/laptop-0 && ln -sfn ../../$* $(P)/laptop-0/$*

$(P)/%/base/model.pt: $(DATA)/tokenizer.json
	$(HALF) sft.py @data/tinyworld/base.args --size $(size) $(base-$(size)) $(FROM)

$(P)/%/sft/model.pt: $(P)/%/base/model.pt
	$(HALF) sft.py --init $< $(sft-$(size)) $(FROM)

# Section C.1's number of epochs and dropout, to see it overfit.
$(P)/%/sft16/model.pt: $(P)/%/base/model.pt
	$(HALF) sft.py --init $< --epochs 16 --dropout 0.2 $(FROM)

# One reward model serves all sizes.
$(P)/%/reward/model.pt: $(P)/%/sft/model.pt $(DATA)/comparisons.train.jsonl
	$(HALF) reward.py --init $< $(FROM)

$(P)/%/model.pt: $(P)/$$(group)/sft/model.pt $(P)/laptop-$$(seed)/reward/model.pt
	$(HALF) ppo.py --policy $< --reward $(word 2,$^) $(ppo-$(size)) $(or $(flags-$(notdir $*)),$(error no flags-$(notdir $*))) $(FROM)

# Baselines: the base model fine-tuned on mixes of public tasks.
$(PUBLIC:%=$(P)/%/tokenizer.json): $(P)/%/tokenizer.json: $(DATA)/tokenizer.json
	$(RUN) paper/datasets.py --kind $* --data $(DATA) --out $(@D)

$(PUBLIC:%=$(P)/desktop-0/%/model.pt): $(P)/desktop-0/%/model.pt: $(P)/%/tokenizer.json $(P)/desktop-0/base/model.pt
	$(HALF) sft.py --data $(<D) --init $(word 2,$^) --pretrain_mix 0 $(sft-desktop) --out $(@D)

# Reward models trained on no ranking by a fifth of the labelers. (The SFT model that they start from saw demonstrations of all.)
$(FOLDS:%=$(P)/fold%/tokenizer.json): $(P)/fold%/tokenizer.json: $(DATA)/comparisons.train.jsonl
	$(RUN) paper/datasets.py --kind fold --fold $* --folds $(words $(FOLDS)) --data $(DATA) --out $(@D)

$(FOLDS:%=$(P)/laptop-0/fold%/model.pt): $(P)/laptop-0/fold%/model.pt: $(P)/fold%/tokenizer.json $(OUT)/sft/model.pt
	$(HALF) reward.py --data $(<D) --init $(OUT)/sft/model.pt --out $(@D)

# Steps 2 and 3 again, on the newest policy: 2,500 prompts on which nothing was ranked yet.
$(P)/round2/collected: $(OUT)/ppo/model.pt
$(P)/round3/collected: $(P)/laptop-0/round2_ppo/model.pt
earlier-2 = $(DATA)
earlier-3 = $(P)/round2
skip-2 = 5000
skip-3 = 7500
$(ROUNDS:%=$(P)/round%/collected): $(P)/round%/collected:
	mkdir -p $(@D) && cp $(earlier-$*)/*.jsonl $(earlier-$*)/tokenizer.json $(@D)
	$(HALF) data/collect.py --data $(@D) --prompts 2500 --skip $(skip-$*) \
	    --sources $<@0.7,$<@1,$<@1.4,$(OUT)/sft/model.pt@1
	touch $@

$(ROUNDS:%=$(P)/laptop-0/round%_reward/model.pt): $(P)/laptop-0/round%_reward/model.pt: $(P)/round%/collected
	$(HALF) reward.py --data $(<D) --init $(OUT)/sft/model.pt --out $(@D)

$(ROUNDS:%=$(P)/laptop-0/round%_ppo/model.pt): $(P)/laptop-0/round%_ppo/model.pt: $(P)/laptop-0/round%_reward/model.pt
	$(HALF) ppo.py --data $(DATA) --policy $(OUT)/sft/model.pt --reward $< --out $(@D)

# A checkpoint along the way is there when the run's last one is.
define along_the_way
$(P)/%/$(1).pt: $(P)/%/model.pt
	@test -f $$@ || { echo "$$@ is missing: delete $$(realpath $$(<D)) to have it trained again"; exit 1; }
	@touch $$@
endef
$(foreach n,$(sort $(EPOCHS) $(LONG_EPOCHS)),$(eval $(call along_the_way,epoch$(n))))
$(foreach n,$(sort $(TRAINING) $(OPTIMIZING)),$(eval $(call along_the_way,iteration$(n))))

# Everything is compared with one sample of the largest SFT model.
MEASURE = $(HALF) paper/measure.py --data $(DATA) --out $@
# ...by whom, and beside what.
JUDGED = --reward $(P)/laptop-$(seed)/reward/model.pt --reference $(P)/$(group)/sft/model.pt --baseline $(P)/measured/baseline.json

$(P)/measured/baseline.json: $(P)/desktop-0/sft/model.pt
	$(MEASURE) --model $<

$(P)/measured/%/base/prompted.json: $(P)/%/base/model.pt $(P)/measured/baseline.json $(P)/$$(group)/sft/model.pt $(P)/laptop-$$(seed)/reward/model.pt
	$(MEASURE) --model $< --few_shot $(JUDGED)

$(P)/measured/%/bestof.json: $(P)/%/sft/model.pt $(P)/measured/baseline.json $(P)/%/reward/model.pt
	$(MEASURE) --model $< --best_of 64 --prompts 500 $(JUDGED)

$(P)/measured/%.json: $(P)/%.pt $(P)/measured/baseline.json $(P)/$$(group)/sft/model.pt $(P)/laptop-$$(seed)/reward/model.pt
	$(MEASURE) --model $< $(JUDGED)
