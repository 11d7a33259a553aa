# make demo   trains a classifier and DXAI on the built-in data, explains a folder, writes a report (minutes on a CPU)
# make test   everything the continuous integration checks
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test install lock clean

install: .venv/.installed

# uv is bootstrapped by pip and installs the pinned packages in about a minute or two; compiled once, they are imported in
# half the time by every process.
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/python train.py --config classifier_synthetic.yaml --output $(DEMO) --model.output $(DEMO)/classifier.pt
	$(BIN)/python train.py --config dxai_synthetic.yaml --output $(DEMO) \
		--model.classifier.init_args.path $(DEMO)/classifier.pt
	$(BIN)/python -c "from cfe_lightning.data.synthetic import SyntheticShapes; SyntheticShapes().write_folder('test', '$(DEMO)/photos', 60)"
	$(BIN)/python explain.py --checkpoint $(DEMO)/dxai_synthetic/best.ckpt --input $(DEMO)/photos --output $(DEMO)/explained
	$(BIN)/cfe-evaluate --checkpoint $(DEMO)/dxai_synthetic/best.ckpt \
		--data dxai_synthetic.yaml --baselines integrated_gradients,grad_cam,random --limit 200 --output $(DEMO)/evaluated
	@echo "Open $(DEMO)/explained/report.html and $(DEMO)/evaluated/report.html in a browser."

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

lock:
	$(BIN)/uv pip compile --quiet --universal --extra dev --no-annotate --no-header --no-emit-index-url --upgrade \
		pyproject.toml -o requirements.lock

clean:
	rm -rf .venv $(DEMO) .pytest_cache .mypy_cache .ruff_cache
