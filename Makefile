# The two commands of the README, and what CI runs. Everything is installed into .venv from pyproject.toml and constraints.txt.
PYTHON ?= python3
PYTHON310 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.10)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# Where PyTorch comes from: without an NVIDIA driver from its index of CPU builds, since pip's index has builds with CUDA, which are
# several GB; empty for pip's index, as in make demo TORCH_INDEX=
TORCH_INDEX ?= $(if $(wildcard /proc/driver/nvidia/version)$(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
# A recording to decode in the demonstration, as in make demo RECORDING=session1.edf
RECORDING ?=
comma := ,
# What the demonstration runs: [train] without TensorBoard, [stream], and [eeg] for a recording only.
DEMO_EXTRAS := export,stream$(if $(RECORDING),$(comma)eeg)

.PHONY: demo test test-soak recordings browser test-gpu gpu-pack lint types docs package runtime310 test-3.10 clean

$(VENV)/torch-installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info)' || \
		{ echo "sjepa-deploy needs Python 3.10 or later: name one, as in make PYTHON=python3.11"; exit 2; }
	@echo "== Installing PyTorch into $(VENV)$(if $(TORCH_INDEX), (CPU build: no NVIDIA driver was found))"
	$(PYTHON) -m venv $(VENV)
	test -z "$(TORCH_INDEX)" || $(PIP) --no-compile --no-deps --retries 1 --index-url $(TORCH_INDEX) torch || \
		echo "$(TORCH_INDEX) cannot be reached: the usual index is asked instead, whose builds bring CUDA (several GB)."
	@touch $@

$(VENV)/installed: $(VENV)/torch-installed pyproject.toml
	@echo "== Installing what tests and checks need into $(VENV) (some minutes)"
	$(PIP) --quiet --editable '.[dev]'
	$(PIP) --quiet --no-deps nvidia-pytriton
	touch $@

$(VENV)/demo-installed$(if $(RECORDING),-eeg): $(VENV)/torch-installed pyproject.toml
	@echo "== Installing sjepa-deploy and what the demonstration needs"
	$(PIP) --no-compile --editable '.[$(DEMO_EXTRAS)]' lightning
	@touch $@

demo: recording-exists $(VENV)/demo-installed$(if $(RECORDING),-eeg)
	@rm -rf demo && mkdir demo
	@echo "== 1. Training: a PostLocal learns reaction times from synthetic EEG of 6 subjects (about half a minute)"
	$(BIN)/sjepa-finetune --config sjepa_deploy/configs/demo.yaml --out demo/model --json > demo/finetune.json
	@echo "== 2. Export: the model becomes a bundle of ONNX graphs, each compared with PyTorch in float64"
	$(BIN)/sjepa-export --checkpoint demo/model --out demo/bundle
	@echo "== 3. Verification: the bundle's stored reference is computed again on this machine"
	$(BIN)/sjepa-verify demo/bundle --backend ort-cpu --precision fp32 --json > demo/verify.json
	@echo "== 4. Live decoding: 10 s of a synthetic stream, 50 decisions a second"
	$(BIN)/sjepa-stream demo/bundle --source synthetic --hop 0.02 --duration 10 --quiet --out demo/decisions.jsonl --json > demo/stream.json
ifneq ($(RECORDING),)
	@echo "== 5. Recording: $(RECORDING) is decoded"
	$(BIN)/sjepa-run demo/bundle "$(RECORDING)" --interpolate 1 --hop 0.5 --out demo/predictions.tsv --json > demo/run.json
endif
	@$(BIN)/python -m sjepa_deploy.cli.demo demo

# Before minutes of installing and training.
.PHONY: recording-exists
recording-exists:
	@test -z "$(RECORDING)" || test -e "$(RECORDING)" || { echo "There is no recording $(RECORDING): check the path."; exit 2; }

# Both halves run, whatever the first one says. More for pytest stands in PYTEST, as in make test PYTEST=--require-recordings.
PYTEST ?=
test: $(VENV)/installed
	@if ! ($(HAS_BROWSER)) && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		$(MAKE) browser || echo "Chromium cannot be installed here: the tests of pages are skipped."; fi
	@echo "1 of 2: the tests that run beside each other: three on two cores, since many of them wait."
	@failed=0; \
	$(BIN)/python -m pytest -rs --numprocesses 3 --dist worksteal -m "not gpu and not alone and not soak" $(PYTEST) || failed=1; \
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

# What takes over a minute of a core and shows what the benchmarks measure at more length.
test-soak: $(VENV)/installed
	$(BIN)/python -m pytest -m soak

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

# The site, built without a network. Warnings are errors; links inside are checked, and those to other places are listed.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_built
	@echo "The site is docs/_built/index.html. External links: docs/_built/external_links.txt"

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
	rm -rf $(VENV) .venv-3.* build dist demo docs/_built docs/_made docs/gallery/tutorial
