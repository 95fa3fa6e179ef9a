# make demo: see it run on real data, no download. make test: prove that it works.
PYTHON ?= python3
BIN = .venv/bin
DIGITS = --data_config config/dataset/rotated_digits.yaml --hp_config config/hyperparam/small.yaml --samples 20 --continual

.PHONY: demo test test-kills test-cluster test-fuzz clean

demo: .venv/run
	$(BIN)/python modelzoo.py $(DIGITS) --tasks_per_round 1 --name demo-isolated --resume
	$(BIN)/python modelzoo.py $(DIGITS) --name demo-modelzoo --resume

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

# Longer: 50 kills at random moments; a Ray cluster of two nodes; ten times the cases of the fuzz tests.
test-kills: .venv/test
	$(BIN)/python -m pytest -q -m kills

test-cluster: .venv/test
	$(BIN)/python -m pytest -q -m cluster

test-fuzz: .venv/test
	FUZZ=10 $(BIN)/python -m pytest -q tests/test_fuzz.py

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt requirements-hpo.txt .venv/run
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
