# make demo: see it run on real data, no download. make test: prove that it works.
PYTHON ?= python3
BIN = .venv/bin
DIGITS = --data_config config/dataset/rotated_digits.yaml --hp_config config/hyperparam/small.yaml --samples 20 --continual

.PHONY: demo test test-kills test-cluster test-gpu test-fuzz clean

demo: .venv/run
	$(BIN)/python modelzoo.py $(DIGITS) --tasks_per_round 1 --name demo-isolated --resume
	$(BIN)/python modelzoo.py $(DIGITS) --name demo-modelzoo --resume
	$(BIN)/python modelzoo.py $(DIGITS) --inherit --name demo-inherit --resume
	$(BIN)/python tools/report.py runs/demo-modelzoo runs/demo-inherit runs/demo-isolated
	$(BIN)/python tools/plot.py methods runs/demo-modelzoo runs/demo-inherit runs/demo-isolated --file runs/demo.png
	@echo "The figure is runs/demo.png. What to try next: more seeds (--seed 1 --name demo-modelzoo-1, which give"
	@echo "intervals), your own data (docs/data.md), Avalanche's methods beside these (docs/peers.md)."

# Ruff reads the project's files, not what a user keeps beside them.
test: .venv/test
	$(BIN)/ruff check $$(git ls-files '*.py' '*.ipynb' 2>/dev/null || echo .)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# Longer: 70 kills at random moments; a Ray cluster of two nodes; ten times the cases of the fuzz tests.
test-kills: .venv/test
	$(BIN)/python -m pytest -q -m kills

test-cluster: .venv/test
	$(BIN)/python -m pytest -q -m cluster

# On a machine with a GPU; ends with a few lines to paste into an issue.
test-gpu: .venv/test
	GPU=1 $(BIN)/python -m pytest -q -s -m gpu tests/test_gpu.py

test-fuzz: .venv/test
	FUZZ=10 $(BIN)/python -m pytest -q tests/test_fuzz.py tests/test_memory.py

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt requirements-hpo.txt constraints.txt .venv/run
	$(BIN)/python -m pip install -q -c constraints.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
