# Each target sets up what it needs in .venv; only Python, make and git have to be there.
PYTHON ?= python3
BIN := .venv/bin
META := settings.ini setup.py pyproject.toml constraints.txt

.PHONY: demo test docs readme outputs clean

demo: .venv/demo  ## train a GPT to add, and test it
	$(BIN)/mingpt-nb adder

# Chapters run side by side, and the threads that torch starts in each would fight over the same cores.
test: export OMP_NUM_THREADS = 1
test: .venv/dev  ## run all chapters, then the tests
	PYTHONWARNINGS=error $(BIN)/nbdev-test --timing
	$(BIN)/pytest -q

docs: .venv/dev  ## render the site into _docs
	$(BIN)/python -c "from nbdev.serve import proc_nbs; proc_nbs()"
	$(BIN)/smalldocs render _proc

readme: .venv/dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python -m mingpt_nb.book nbs/index.ipynb README.md

outputs: export OMP_NUM_THREADS = 1
outputs: .venv/dev  ## export the chapters, run them, and save what they print and draw
	$(BIN)/nbdev-export
	PYTHONWARNINGS=error $(BIN)/nbdev-test --save --n-workers 0
	$(BIN)/nbdev-clean

clean:
	rm -rf .venv _proc _docs build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: $(META) | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[plot]'
	touch $@

.venv/dev: $(META) | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
