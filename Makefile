# make quickstart   from a fresh clone to quickstart/report.html (CORPUS=folder takes real video instead of the demo)
# make test         the whole test suite (PYTEST_ARGS=… goes to pytest)
# make test-ranks   the longer tests of equality over ranks, kills and signals
# make test-faults  faults injected into real runs, twenty of each; goes on where it stopped, and writes benchmarks/faults
# make test-zero    the matrix of ZeRO stages, precisions, systems, ranks …, every pair; writes benchmarks/zero
# make demo-tables  the tables of the paper: arms, ablations, shares of the labels and of the corpus
# make demo-mrepc   TCMP on the demo corpus: searches, and pre-recognition of the next emotion
# make demo-pairs   the image–text bi-encoder on generated portraits: search, control, and the emotion classifier
# make demo-report  the demo table: three seeds, every arm, the control
# make demo-respond IgERG on the demo corpus: responses with and without pictures, with and without pre-training
# make bench-check  run the benchmarks again, and fail where a ratio fell by more than 15 % (CLIPS=folder YUNET=model.onnx adds prepare's)
# make lint         format, style and types
# make gpu-check    on a machine with a GPU: build csrc/, run the tests that need one, measure kernels and a step
# make native       build csrc/ with the torch of .venv
# make clean        remove what the other targets made

# Images set this, and then every process compiles PyTorch's modules anew, which takes twice as long as importing them.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?=
CORPUS ?=
CLIPS ?=
YUNET ?=
QUICK := quickstart
BIN := $(VENV)/bin
EMOSCALE := $(BIN)/emoscale
# Without a GPU in sight, as Triton's interpreter and ranks on CPUs want it; `make gpu-check` runs what needs one.
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest
DEMO := configs/pretrain/memobert-demo.yaml
PROJECT := pyproject.toml setup.py
, := ,

# uv installs the stack about three times as fast as pip, but reads none of pip's configuration: pip does it where
# an index of one's own is configured, and where uv cannot be had or fails.
define install
@start=$$(date +%s); echo "== install .[$(1)]"; \
$(BIN)/python -m pip install -q --no-compile uv >/dev/null 2>&1 || true; \
if [ -x $(BIN)/uv ] && ! $(BIN)/python -m pip config list 2>/dev/null | grep -qE "\.(index-url|no-index)="; then \
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install -q -e '.[$(1)]' && ok=1 || echo "uv failed; pip takes over"; \
fi; \
[ -n "$$ok" ] || $(BIN)/python -m pip install -q --no-compile -e '.[$(1)]' || exit 1; \
echo "== install .[$(1)]: $$(($$(date +%s) - start)) s"; touch $(2)
endef

timed = @start=$$(date +%s); echo "== $(1)"; $(2) && echo "== $(1): $$(($$(date +%s) - start)) s"

.PHONY: quickstart test test-ranks test-slurm test-s3 test-faults test-zero demo-report demo-tables demo-mrepc demo-pairs demo-respond bench-check gpu-check lint native clean
.DELETE_ON_ERROR:

ifeq ($(CORPUS),)
quickstart: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo.yaml)
	$(call timed,pretrain,$(EMOSCALE) pretrain $(DEMO))
	$(call timed,finetune,$(EMOSCALE) finetune configs/finetune/demo.yaml)
	@cp $(QUICK)/finetune/report.html $(QUICK)/report.html
	@echo "report: $(QUICK)/report.html"
else
quickstart: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare 'source=$(CORPUS)' output=$(QUICK)/own/corpus)
	$(call timed,pretrain,$(EMOSCALE) pretrain $(DEMO) data.only= 'data.corpora=[$(QUICK)/own/corpus]' run.output=$(QUICK)/own/pretrain)
	@cp $(QUICK)/own/pretrain/report.html $(QUICK)/report.html
	@echo "report: $(QUICK)/report.html (these films have no labels, so nothing was fine-tuned)"
endif

demo-report: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo.yaml)
	@for seed in 1 2 3; do \
		$(EMOSCALE) pretrain $(DEMO) run.seed=$$seed run.output=$(QUICK)/report/pretrain-$$seed || exit 1; \
		$(EMOSCALE) pretrain $(DEMO) run.seed=$$seed run.output=$(QUICK)/report/control-$$seed data.shuffle_modalities=true || exit 1; \
	done
	$(call timed,finetune,$(EMOSCALE) finetune configs/finetune/demo-report.yaml)
	@echo "report: $(QUICK)/report/report.html"

TABLE = $(EMOSCALE) pretrain $(DEMO) run.seed=1 run.output=$(QUICK)/tables
demo-tables: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo.yaml)
	$(TABLE)/full
	$(TABLE)/no-visual objectives.masked_visual.mix=0 objectives.visual_emotion.mix=0 objectives.utterance_emotion.mix=0
	$(TABLE)/no-acoustic objectives.masked_acoustic.mix=0
	$(TABLE)/no-span objectives.masked_acoustic.span=1 objectives.masked_visual.span=1 objectives.masked_text.whole_word=false
	$(TABLE)/words objectives.masked_acoustic.mix=0 objectives.masked_visual.mix=0 objectives.visual_emotion.mix=0 objectives.utterance_emotion.mix=0
	$(TABLE)/half data.fraction=0.5
	$(TABLE)/quarter data.fraction=0.25
	$(call timed,finetune,$(EMOSCALE) finetune configs/finetune/demo-tables.yaml)
	@echo "report: $(QUICK)/tables/report.html"

TCMP = $(EMOSCALE) pretrain configs/pretrain/tcmp-demo.yaml
demo-mrepc: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo-dialogues.yaml)
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo-forecasts.yaml)
	@for seed in 1 2 3; do \
		$(TCMP) run.seed=$$seed run.output=$(QUICK)/tcmp/pretrain-$$seed || exit 1; \
		$(TCMP) run.seed=$$seed run.output=$(QUICK)/tcmp/control-$$seed dialogue.shuffle=true || exit 1; \
	done
	$(TCMP) run.output=$(QUICK)/tcmp/intra objectives.fused_search.weight=0 objectives.consistency.weight=0
	$(TCMP) run.output=$(QUICK)/tcmp/inter objectives.text_search.weight=0 objectives.acoustic_search.weight=0 objectives.consistency.weight=0
	$(EMOSCALE) evaluate model=$(QUICK)/tcmp/pretrain-1 corpus=$(QUICK)/forecasts report=$(QUICK)/tcmp/searches.html \
		'beside={intra-modal: $(QUICK)/tcmp/intra$(,) inter-modal: $(QUICK)/tcmp/inter$(,) control: $(QUICK)/tcmp/control-1}'
	$(call timed,finetune,$(EMOSCALE) finetune configs/finetune/mrepc-demo.yaml)
	@echo "reports: $(QUICK)/tcmp/searches.html $(QUICK)/mrepc/report.html"

PAIRS = $(EMOSCALE) pretrain configs/pretrain/bi-encoder-demo.yaml
demo-pairs: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo-portraits.yaml)
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo-portraits-labelled.yaml)
	$(call timed,pretrain,$(PAIRS))
	$(PAIRS) run.output=$(QUICK)/bi-encoder-control data.shuffle_modalities=true
	$(EMOSCALE) evaluate model=$(QUICK)/bi-encoder report=$(QUICK)/pairs.html 'beside={control: $(QUICK)/bi-encoder-control}'
	$(call timed,finetune,$(EMOSCALE) finetune configs/finetune/bi-encoder-demo.yaml)
	@echo "reports: $(QUICK)/pairs.html $(QUICK)/pairs/report.html"

RESPONSE = $(EMOSCALE) pretrain configs/pretrain/response-demo.yaml run.seed=$$seed
RESPOND = $(EMOSCALE) finetune configs/finetune/respond-demo.yaml run.seed=$$seed
RESPOND_BESIDE = "without pictures": "$(QUICK)/respond/blind-{seed}"$(,) "without pre-training": "$(QUICK)/respond/scratch-{seed}"$(,) \
	"without$(,) as many steps": "$(QUICK)/respond/long-{seed}"$(,) "control": "$(QUICK)/respond/control-{seed}"$(,) \
	"without emotion term": "$(QUICK)/respond/no-term-{seed}"
demo-respond: $(VENV)/.installed
	$(call timed,prepare,$(EMOSCALE) prepare configs/prepare/demo.yaml)
	$(EMOSCALE) finetune configs/finetune/text-emotion-demo.yaml
	$(EMOSCALE) finetune configs/finetune/text-emotion-demo.yaml 'run_folds=[2]' 'seeds=[2]' output=$(QUICK)/judge
	@for seed in 1 2 3; do \
		$(RESPONSE) run.output=$(QUICK)/respond/pretrain-$$seed || exit 1; \
		$(RESPOND) run.output=$(QUICK)/respond/full-$$seed model.init=$(QUICK)/respond/pretrain-$$seed || exit 1; \
		$(RESPOND) run.output=$(QUICK)/respond/blind-$$seed model.init=$(QUICK)/respond/pretrain-$$seed turns.ground=none || exit 1; \
		$(RESPOND) run.output=$(QUICK)/respond/no-term-$$seed model.init=$(QUICK)/respond/pretrain-$$seed objectives.response_emotion.weight=0 || exit 1; \
		$(RESPOND) run.output=$(QUICK)/respond/scratch-$$seed model.init= || exit 1; \
		$(RESPOND) run.output=$(QUICK)/respond/long-$$seed model.init= run.steps=780 || exit 1; \
		$(RESPONSE) run.output=$(QUICK)/respond/shuffled-$$seed data.shuffle_modalities=true || exit 1; \
		$(RESPOND) run.output=$(QUICK)/respond/control-$$seed model.init=$(QUICK)/respond/shuffled-$$seed || exit 1; \
	done
	$(EMOSCALE) evaluate 'model=$(QUICK)/respond/full-{seed}' 'seeds=[1, 2, 3]' judge=$(QUICK)/judge/models/words labels=$(QUICK)/demo/labels.csv \
		'beside={$(RESPOND_BESIDE)}' \
		report=$(QUICK)/respond/report.html

test: $(VENV)/.installed-dev
	$(PYTEST) $(PYTEST_ARGS)

test-ranks: $(VENV)/.installed-dev
	$(PYTEST) -m slow tests/training/test_engine.py tests/training/test_run.py tests/training/test_tcmp.py \
		tests/training/test_encoders.py tests/training/test_bi_encoder.py tests/training/test_respond.py \
		tests/training/test_worlds.py tests/training/test_norms.py tests/training/test_saving.py tests/training/test_mirror.py \
		tests/training/test_watchdog.py tests/prepare/test_workers.py tests/test_imports.py $(PYTEST_ARGS)

test-slurm: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and not faults" tests/slurm $(PYTEST_ARGS)

test-s3: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and not faults" tests/s3 $(PYTEST_ARGS)

test-faults: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and faults" tests/faults tests/slurm tests/s3 $(PYTEST_ARGS)
	$(BIN)/python -m tests.faults.ledger

test-zero: $(VENV)/.installed-dev
	$(PYTEST) -m slow tests/zero $(PYTEST_ARGS)
	$(BIN)/python -m tests.zero.page

bench-check: $(VENV)/.installed-dev
	$(EMOSCALE) bench check $(if $(CLIPS),'source=$(CLIPS)') $(if $(YUNET),'prepare=[preprocess.faces.detector=yunet$(,)preprocess.faces.model=$(YUNET)]')

gpu-check: native
	$(BIN)/python -m pytest -q -m gpu tests; tested=$$?; $(EMOSCALE) bench gpu && exit $$tested

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

native: $(VENV)/.installed-dev
	EMOSCALE_BUILD=1 $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

$(VENV)/.installed: $(PROJECT) | $(BIN)/python
	$(call install,prepare$(,)finetune$(,)generation,$@)

$(VENV)/.installed-dev: $(PROJECT) | $(BIN)/python
	$(call install,prepare$(,)finetune$(,)generation$(,)dev,$@ $(VENV)/.installed)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "emoscale: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "emoscale: $(PYTHON) is $$($(PYTHON) --version), 3.11 or newer is needed; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "emoscale: $(PYTHON) cannot make environments; apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(QUICK) build *.egg-info .pytest_cache .ruff_cache
