# Every target sets itself up: a machine with Python 3.11.4 or later and make needs nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python)
BIN := .venv/bin
RUN = runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: install demo test check bench bench-peers docs clean

install: .venv/installed  ## and the kernels, anew where their sources have changed
	@$(BIN)/unrolled kernels build > /dev/null || true

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11, 4) and f"Python 3.11.4 or later is needed, not {v}; make PYTHON=/path/to/python")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## train on the embedded corpus, then predict and generate
	@set -e; run=$(RUN); \
	$(BIN)/unrolled train demo --out $$run; \
	echo; echo "The likeliest words after 'return the number of':"; \
	$(BIN)/unrolled predict $$run "return the number of" -k 5; \
	echo; echo "Written by the model:"; \
	$(BIN)/unrolled generate $$run --prompt "this method" --length 80 --temperature 0.8 --seed 1; \
	echo; echo "The run folder is $$run"

test: check  ## lint, types and all tests
	$(BIN)/python -m pytest -n 2

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: install  ## speed, against plain PyTorch in the same run
	$(BIN)/python benchmarks/encode.py
	$(BIN)/unrolled bench

bench-peers: install .peers/jax .peers/keras  ## training, against JAX, Keras and torch.compile too
	$(BIN)/unrolled bench --recipe ptb-small ptb-medium --task train --subject \
		"jax=.peers/jax/bin/python benchmarks/peers/jax_lm.py" \
		"keras=.peers/keras/bin/python benchmarks/peers/keras_lm.py"

.peers/jax:
	$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet jax==0.10.2 || { rm -rf $@; false; }

.peers/keras:
	$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet tensorflow-cpu==2.21.0 || { rm -rf $@; false; }

docs: install  ## what in docs/ is made from the code
	$(BIN)/python docs/make.py --tour

clean:
	rm -rf .venv .peers .pytest_cache .ruff_cache .hypothesis
