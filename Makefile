# Python 3.11 and make are all that has to be there; `make help` lists the targets.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint check bench notebooks toy adapter variants meaning \
  figures browser clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED)  ## .venv with the package and everything around it

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit( \
	  "vlm_probe needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] \
	  + ". Name another one: make install PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; PyTorch alone is some gigabytes, so minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## probe held-out toy pictures: a table, and a report in one file
	$(BIN)/vlm-probe demo

test: install  ## all tests, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: install  ## format, lint and types, without the tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint  ## lint, then test: what CI asks
	$(MAKE) test

bench: install  ## measure time and memory, some minutes; PARTS=contenders for less
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(PARTS)

notebooks: install  ## execute every notebook
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_notebooks.py

# By default glibc hands large temporaries back to the system at every use and pays
# page faults for each anew; kept, they make training on CPU up to seven times faster.
toy adapter variants: export MALLOC_MMAP_MAX_ = 0
toy adapter variants: export MALLOC_TRIM_THRESHOLD_ = 20000000000
toy adapter variants: export MALLOC_TOP_PAD_ = 268435456
toy: install  ## train the toy again into data/toy, an hour or two
	$(BIN)/vlm-probe toy

adapter: install  ## train the toy's adapter again between its frozen parts, a quarter
	$(BIN)/vlm-probe toy --stages adapter

variants: install  ## train and compare other adapters, an hour; docs/adapter_variants.md
	$(BIN)/vlm-probe toy-variants

meaning: install  ## what the toy's features say, a minute; docs/toy_features.md
	$(BIN)/vlm-probe toy-meaning

figures: install  ## draw the README's figure again; needs a Chrome or Chromium
	$(BIN)/vlm-probe demo --figure docs/toy_curves.png

browser:  ## the Chromium that the tests look through, on Debian
	.ci/browser

clean:  ## everything that was built, .venv included
	rm -rf .venv build dist demo toy-work *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
