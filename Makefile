# Each target sets up what it needs in .venv; only Python, make and git have to be there.
PYTHON ?= python3
BIN := .venv/bin
META := settings.ini setup.py pyproject.toml constraints.txt

.PHONY: demo test check bench docs smalldocs preview readme outputs clean

demo: .venv/demo  ## train a GPT to add, and test it
	$(BIN)/mingpt-nb adder

# Chapters run side by side, and the threads that torch starts in each would fight over the same cores. They run in a copy, where
# their outputs are kept for `make check`.
test: export OMP_NUM_THREADS = 1
test: .venv/dev  ## run all chapters, then the tests
	rm -rf _run && cp -R nbs _run
	PYTHONWARNINGS=error $(BIN)/nbdev-test _run --save --timing
	$(BIN)/pytest -q

check: .venv/dev  ## after make test: did the chapters print what the pages show?
	@test -d _run || { echo "run 'make test' first" >&2; exit 1; }
	$(BIN)/python -m mingpt_nb.book check nbs _run

bench: .venv/dev  ## measure against other libraries, in under 20 minutes, into benchmarks/results
	$(BIN)/python benchmarks

docs: .venv/dev  ## render the site into _docs, with Quarto where it is installed
	rm -rf _proc _docs
	if command -v quarto > /dev/null; then $(BIN)/nbdev-docs; else $(MAKE) smalldocs; fi
	$(BIN)/python -m mingpt_nb.book finish _docs

smalldocs:
	$(BIN)/python -c "from nbdev.serve import proc_nbs; proc_nbs()"
	$(BIN)/python -c "from smalldocs.site import build; build('_proc', quiet=True)"
	mv _proc/_docs _docs

preview: docs  ## render the site and serve it until Ctrl-C
	@echo "The book is at http://127.0.0.1:3000"
	$(BIN)/python -m http.server 3000 --bind 127.0.0.1 --directory _docs

readme: .venv/dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python -m mingpt_nb.book readme nbs/index.ipynb README.md

outputs: export OMP_NUM_THREADS = 1
outputs: .venv/dev  ## export the chapters, run them, and save what they print and draw
	$(BIN)/nbdev-export
	PYTHONWARNINGS=error $(BIN)/nbdev-test --save --n-workers 0
	$(BIN)/nbdev-clean

clean:
	rm -rf .venv _proc _docs _run build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: $(META) | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[plot]'
	touch $@

.venv/dev: $(META) | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
