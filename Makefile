# `make demo` and `make test` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Of torch: "pinned" is the version in constraints.txt; else what follows the name, '==2.7.*', or nothing for the newest.
# Another version wants an environment of its own: make test VENV=.venv/old TORCH='==2.7.*'
TORCH  ?= pinned
VERSIONS := $(if $(filter pinned,$(TORCH)),constraints.txt,$(VENV)/constraints.txt)
# curvlinops, and what it imports.
PEERS  := backpack-for-pytorch opacus curvlinops-for-pytorch einconv linear_operator tqdm jaxtyping wadler-lindig

WORKERS := 2

.PHONY: help venv demo test test-slow test-cuda check docs dist bench bench-curvature bench-modern bench-clients plan-choice prices clean
.NOTPARALLEL:

help:
	@echo "make demo    install, then show the main job on handwritten digits"
	@echo "make test    install, then run the tests"
	@echo "make test-slow  the tests that take long: pictures, command lines, generated files inside BackPACK, the zoo of models"
	@echo "make test-cuda  the tests that need a CUDA device"
	@echo "make check   ruff, mypy and the guide"
	@echo "make docs    build the guide into site/"
	@echo "make dist    build wheel and sdist, install each into an empty environment, check a client's types"
	@echo "make bench   install the peers, then time the first-order quantities (BENCH='--device cuda' for options)"
	@echo "make bench-curvature  the same for curvature and Kronecker factors"
	@echo "make bench-clients  clipping, natural gradients, EKFAC, attach, saved bytes"
	@echo "make bench-modern  transformers, residual, U-shaped and recurrent nets against autograd and vmap"
	@echo "make plan-choice  time both plans of every parameter of 3C3D against what the compiler chose"
	@echo "make prices  time every step of real programs against what was predicted for it"
	@echo "make clean   remove .venv and every cache"

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: constraints.txt | $(BIN)/pip
	sed '/^torch\(vision\)*==/d' constraints.txt > $@
	$(if $(strip $(TORCH)),echo 'torch$(strip $(TORCH))' >> $@)

# One stamp for each extra; older than pyproject.toml or the constraints, it is made again.
$(VENV)/.installed-%: pyproject.toml $(VERSIONS) | $(BIN)/pip
	$(PIP) install --quiet -c $(VERSIONS) -e '.[$*]'
	@touch $@

$(VENV)/.installed-peers: $(VENV)/.installed-bench
	$(PIP) install --quiet -c $(VERSIONS) --no-deps $(PEERS)
	@touch $@

.PRECIOUS: $(VENV)/.installed-%

venv: $(VENV)/.installed-test

demo: $(VENV)/.installed-examples
	$(BIN)/tnbackprop demo --output tnbackprop-demo --force

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST)

test-slow: $(VENV)/.installed-test $(VENV)/.installed-peers $(VENV)/.installed-zoo
	$(MAKE) test PYTEST='-m slow'

test-cuda: $(VENV)/.installed-test
	$(MAKE) test PYTEST='-m cuda'

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy --strict tnbackprop
	$(MAKE) docs

# The variable is mkdocs-material's own switch for a notice that has nothing to do with the build.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict --quiet

# The wheel is made from the sdist, so that it has no file which that lacks.
dist: $(VENV)/.installed-dist
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m tests.package.installed $(VERSIONS) dist/*.whl dist/*.tar.gz

bench: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.first_order $(BENCH)

bench-curvature: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.second_order $(BENCH)

bench-modern: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.modern $(BENCH)

bench-clients: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.clients $(BENCH)

prices: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.prices $(BENCH)

plan-choice: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.plan_choice $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis tnbackprop-demo site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
