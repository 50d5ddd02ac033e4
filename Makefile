# make demo   set up, attack, repair and compare on the built-in digits
# make test   set up, then all tests
# make lint   set up, then ruff
# make gpu    set up, then every attack and defense on the GPU and on the CPU, compared
# make pictures  every picture of the pages, which takes half an hour
# make site   set up, then the pages of README.md and docs/ as HTML, in build/site/html

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TESTS := .venv/.ready-tests
DOCS := .venv/.ready-docs

.PHONY: demo test lint gpu pictures site setup clean
.DEFAULT_GOAL := demo

setup: $(READY)

# constraints.txt pins the versions that were tested; requirements.txt says what is enough
$(READY): requirements.txt constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed, this is %s; name one with make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

# Ray for sweeps, a driver for the browser that the tests open the report in, tests in parallel
$(TESTS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]" -c constraints.txt
	@touch $@

# the generator of the site
$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" -c constraints.txt
	@touch $@

demo: $(READY)
	$(BIN)/python attack/badnet.py --dataset digits --save_folder_name demo
	$(BIN)/python defense/ft.py --result_file demo
	$(BIN)/python defense/fmp.py --result_file demo
	$(BIN)/python defense/fp.py --result_file demo
	$(BIN)/python defense/bnp.py --result_file demo
	$(BIN)/python defense/rnp.py --result_file demo
	$(BIN)/python defense/nad.py --result_file demo
	$(BIN)/python defense/ft_sam.py --result_file demo
	$(BIN)/python compare.py record/demo --html record/demo.html

# two processes, of one thread each: most tests start scripts, which is no work for several threads
test: $(TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

site: $(DOCS)
	$(BIN)/python -m benchmarks.site

pictures: $(TESTS)
	$(BIN)/python -m benchmarks.pictures

gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu_check

clean:
	rm -rf .venv data/cache
