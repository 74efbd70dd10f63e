PYTHON ?= python

.PHONY: test-gpu gpu-pack
test-gpu: ## the smoke test of every GPU backend that runs here
	$(PYTHON) -m pytest tests/test_gpu.py -m gpu -q

gpu-pack: ## bundles for benchmarks/gpu_engines.py on a machine without torch
	$(PYTHON) benchmarks/pack_bundles.py .gpu/bundles
