# The two commands of the README, and what CI runs. Everything is installed into .venv from pyproject.toml and constraints.txt.
PYTHON ?= python3
PYTHON310 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.10)
VENV := .venv
BIN := $(VENV)/bin
# A recording to decode in the demonstration, as in make demo RECORDING=session1.edf; without one, synthetic EEG is decoded.
RECORDING ?=

.PHONY: demo test recordings browser test-gpu gpu-pack lint types package runtime310 test-3.10 clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps nvidia-pytriton
	touch $@

demo: $(VENV)/installed
	rm -rf demo && mkdir demo
	$(BIN)/sjepa-finetune --config sjepa_deploy/configs/demo.yaml --out demo/model
	$(BIN)/sjepa-export --checkpoint demo/model --out demo/bundle
	$(BIN)/sjepa-verify demo/bundle
ifeq ($(RECORDING),)
	$(BIN)/python -c "from sjepa_deploy.eeg.synthetic import main; main()" demo/eeg.npy
	$(BIN)/sjepa-run demo/bundle demo/eeg.npy --sfreq 100 --unit uV --hop 0.5 --out demo/predictions.tsv
else
	$(BIN)/sjepa-run demo/bundle $(RECORDING) --interpolate --hop 0.5 --out demo/predictions.tsv
endif
	@echo "The fine-tuned model is in demo/model, the bundle in demo/bundle, its predictions in demo/predictions.tsv."

# Both halves run, whatever the first one says. More for pytest stands in PYTEST, as in make test PYTEST=--require-recordings.
PYTEST ?=
test: $(VENV)/installed
	@if ! ($(HAS_BROWSER)) && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		$(MAKE) browser || echo "Chromium cannot be installed here: the tests of pages are skipped."; fi
	@echo "1 of 2: the tests that run two at a time."
	@failed=0; \
	$(BIN)/python -m pytest -rs --numprocesses 2 --dist worksteal -m "not gpu and not alone" $(PYTEST) || failed=1; \
	echo "2 of 2: the tests that measure time or keep both cores busy, one at a time."; \
	$(BIN)/python -m pytest -rs -m "alone and not gpu" $(PYTEST) || failed=1; \
	exit $$failed

# The real recordings that some tests read: originals, checked by their sha256, in the cache folder of this user.
recordings: $(VENV)/installed
	$(BIN)/python tests/fetch_recordings.py

# What the tests look at pages with: Debian's Chromium, installed where there is none (as root).
HAS_BROWSER = command -v chromium > /dev/null && command -v chromedriver > /dev/null
browser:
	($(HAS_BROWSER)) || (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver)

# The same on another Python, in an environment of its own: make test-3.13
test-3.%:
	$(MAKE) test VENV=.venv-3.$* PYTHON=$(firstword $(wildcard $(HOME)/.pyenv/versions/3.$*.*/bin/python) python3.$*)

# braindecode, the oracle of the networks, asks for Python 3.11 but runs on 3.10: first what it imports, then itself.
test-3.10:
	$(MAKE) .venv-3.10/installed VENV=.venv-3.10 PYTHON=$(PYTHON310)
	.venv-3.10/bin/python -m pip install --quiet --constraint constraints.txt \
		docstring-inheritance h5py linear-attention-transformer pydantic skorch torchaudio torchinfo wfdb
	.venv-3.10/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --ignore-requires-python braindecode
	$(MAKE) test VENV=.venv-3.10

# The smoke test of every GPU backend that runs here.
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_gpu.py -m gpu

# Bundles for benchmarks/gpu_engines.py on a GPU machine without PyTorch.
gpu-pack: $(VENV)/installed
	$(BIN)/python benchmarks/pack_bundles.py .gpu/bundles

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

package: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python tests/check_wheel.py dist

# The runtime half on the oldest Python, without PyTorch: it verifies and runs a bundle from the wheel.
runtime310: package
	rm -rf build/runtime310 && mkdir -p build/runtime310
	$(PYTHON310) -m venv build/runtime310/venv
	build/runtime310/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(BIN)/sjepa-export --variant prelocal --out build/runtime310/bundle
	cd build/runtime310 && venv/bin/sjepa-verify bundle && venv/bin/sjepa-doctor

clean:
	rm -rf $(VENV) .venv-3.* build dist demo
