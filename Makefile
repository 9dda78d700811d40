# Two commands need nothing but Python 3.11 to 3.13 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo docs test test-all test-gpu clients wheels image sbom lint types lock bench bench-gpu bench-acceleration clean

demo: $(READY)  ## the whole loop on a small drawn pool: four rounds beside a trainer, and uniform batches to compare with
	$(BIN)/python -m curate.jobs.demo

test: $(READY)  ## what CI runs: lint, types, tests; eight to fifteen minutes on 2 cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not exhaustive and not gpu"

test-all: $(READY)  ## and every case of what those tests sample
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(READY)  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

docs: $(READY)  ## the site in out/docs: every link within it is checked, recipe and verbs come from the code
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs out/docs

bench: $(READY)  ## time and memory of selection against a bare baseline and the paper's listing
	$(BIN)/python -m benchmarks.selection

bench-gpu: $(READY)  ## what this machine's card makes of it all: embedding, selection, dedup, training; at most 9 minutes
	$(BIN)/python -m benchmarks.gpu --json bench-gpu.json

bench-acceleration: $(READY)  ## do learners learn faster from batches that were chosen jointly? within 30 minutes on 2 cores
	$(BIN)/python -m benchmarks.heads --primary --seeds 3 --report out/heads/report

wheels: $(READY)  ## sdist and wheel, each extra in an empty environment on each Python, and what it brings used
	rm -rf out/wheels
	$(BIN)/python tests/wheel.py out/wheels

clients: $(READY)  ## img2dataset, clip-retrieval and Lance before it, open_clip's trainer after it: the real ones
	rm -rf out/clients
	$(BIN)/python -m tests.clients out/clients

image: $(READY)  ## the image without an engine, on a base of Debian's packages, and a round in it; root, buildah, debootstrap
	rm -rf out/image
	$(BIN)/python -m tests.image out/image

sbom: $(READY)  ## what the image holds, for whoever must know: CycloneDX, from the lock
	mkdir -p out
	$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py requirements requirements.lock --output-file out/sbom.json

lock: $(READY)  ## pin pyproject.toml's dependencies for every supported platform
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --no-emit-index-url --no-header \
	  --generate-hashes --quiet --output-file requirements.lock pyproject.toml

# uv itself is the one thing that plain pip installs; everything else comes from the lock, by hash.
# Compiled here, once: where bytecode is not written, each process would compile torch's sources anew, 5 s of its time.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) demo
