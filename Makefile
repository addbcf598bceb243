# make demo       explain a bundled photo with a bundled model
# make test       run the tests
# make check      format, lint, types, tests
# make mutation   put faults into the rules, one by one, and see that tests notice
# make networks   measure the networks of torchvision and timm against torch: docs/networks.md
# make deployed   measure one network in every form that models are deployed in: docs/deployed.md
# make bench      measure what an explanation costs beside a forward pass, Captum and onnx-ad: docs/bench.md
# make clean      remove what the others made

PYTHON ?= python3
WORKERS ?= 2

.PHONY: demo test check mutation networks deployed bench clean

demo: .venv/installed
	.venv/bin/graphgbp explain models/efficientnet_lite0.onnx models/coffee.png -o demo/ --force

test: .venv-test/installed
	.venv-test/bin/pytest -n $(WORKERS)

check: .venv-test/installed
	.venv-test/bin/ruff format --check
	.venv-test/bin/ruff check
	.venv-test/bin/mypy
	.venv-test/bin/python scripts/model_checksums.py
	$(MAKE) test

mutation: .venv-test/installed
	.venv-test/bin/python scripts/mutate_rules.py

networks: .venv-networks/installed
	.venv-networks/bin/python scripts/networks_table.py --again

deployed: .venv-deployed/installed
	.venv-deployed/bin/python scripts/deployed_table.py

bench: .venv-bench/installed
	.venv-bench/bin/python scripts/bench.py --again
	.venv-bench/bin/python scripts/profile_operators.py

clean:
	rm -rf .venv .venv-test .venv-networks .venv-deployed .venv-bench demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Each environment is made once, and again when pyproject.toml changes.
.venv/installed: EXTRAS =
.venv-test/installed: EXTRAS = [test,check]
.venv/installed .venv-test/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -e '.$(EXTRAS)'
	touch $@

.venv-networks/installed: scripts/requirements-networks.txt
.venv-deployed/installed: scripts/requirements-deployed.txt
.venv-bench/installed: scripts/requirements-bench.txt
.venv-deployed/installed: EXTRAS = [test]
.venv-networks/installed .venv-deployed/installed .venv-bench/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -r $< -e '.$(EXTRAS)'
	touch $@
