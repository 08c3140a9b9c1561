# Two commands: `make picture` (the main job on a fresh machine) and `make test`. Both create .venv on their first run.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= a red heart

picture: .venv/ready
	$(BIN)/latentgen txt2img "$(PROMPT)" -o picture.png

test: .venv/test
	$(BIN)/python -m pytest -q -p no:cacheprovider

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/test: pyproject.toml .venv/ready
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

.PHONY: picture test
