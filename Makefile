# Every target that runs Python makes its environment first: .venv-3.11 for Python 3.11, and so on (.ci/venv).
# An environment begins with requirements.lock, which is all that `make train` needs; the first `make test` or
# `make lint` adds requirements-dev.lock to it, so nobody downloads what they do not use.

PYTHON = python3

# About four minutes on two cores. The window is shorter than the sequence, so that a sample longer than the sequence
# asks for no distance between tokens that training never showed.
TRAIN_RUN = runs/tiny_shakespeare
TRAIN_FLAGS ?= --config nano --dataset tiny_shakespeare --seq-len 64 --model.sliding-window 48 --batch-size 32 --learning-rate 3e-3 --steps 1500 --eval-interval 500 --output-dir $(TRAIN_RUN)
SAMPLE_FLAGS ?= --prompt "ROMEO:" --max-tokens 400 --temperature 0.8 --seed 1

TEST_FLAGS ?= -n 2 --dist worksteal --durations 10 --durations-min 5

CORE = .ci/venv "$(PYTHON)" requirements.lock
DEV = .ci/venv "$(PYTHON)" requirements-dev.lock
GCS = .ci/venv "$(PYTHON)" requirements-gcs.lock
PLAN = .ci/venv "$(PYTHON)" requirements-plan.lock
PLAN_GPU = .ci/venv "$(PYTHON)" requirements-plan-gpu.lock
EVAL = .ci/venv "$(PYTHON)" requirements-eval.lock
BROWSER = .ci/venv "$(PYTHON)" requirements-browser.lock

EXTRAS = dev gcs plan browser plan-gpu eval
COMPILE = uv pip compile pyproject.toml --group build --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --custom-compile-command "make lock" --quiet $(UPGRADE)

.PHONY: help train demo test test-bench test-browser test-eval test-gcs test-parity test-plan test-plan-gpu test-terraform lint clean lock

help: ## list the targets
	@echo "Usage: make TARGET [PYTHON=python3.13]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

train: ## train on Tiny Shakespeare, or resume the run, then print a sample
	@$(CORE) python scripts/train.py $(TRAIN_FLAGS) $(if $(wildcard $(TRAIN_RUN)),--resume)
	@$(CORE) python scripts/generate.py --checkpoint $(TRAIN_RUN) $(SAMPLE_FLAGS)

demo: ## train on Tiny Shakespeare if there is no run, then serve it and print the address
	@[ -n "$(wildcard $(TRAIN_RUN)/checkpoints/*[0-9])" ] || $(CORE) python scripts/train.py $(TRAIN_FLAGS) $(if $(wildcard $(TRAIN_RUN)),--resume)
	@$(CORE) python scripts/serve.py --checkpoint $(TRAIN_RUN) $(SERVE_FLAGS)

# worksteal: half of the tests to each core in file order, so that a module's fixtures are mostly built once.
test: ## run every test that needs only the packages of requirements-dev.lock
	@$(DEV) python -m pytest -m "not external" $(TEST_FLAGS)

# The next four add a lock to the environment of the tests.
test-gcs: ## test checkpoints and runs on gs:// against an emulator, on loopback
	@$(DEV) true
	@$(GCS) python -m pytest -m external tests/parallax/training/test_checkpoint_gs.py tests/scripts/test_train_gs.py tests/scripts/test_train_store_gs.py

test-plan: ## test plan.py with libtpu, the compiler for TPUs; none is needed
	@$(DEV) true
	@$(PLAN) python -m pytest -m external tests/scripts/test_plan_libtpu.py

test-plan-gpu: ## test plan.py with XLA's compiler for GPUs; none is needed
	@$(DEV) true
	@$(PLAN_GPU) python -m pytest -m external tests/scripts/test_plan_gpu.py

test-browser: ## test the server's page in headless Chromium (needs chromium and chromium-driver)
	@command -v chromedriver >/dev/null || { echo "error: the page was not tested: chromedriver is not here; on Debian: apt-get install chromium chromium-driver" >&2; exit 2; }
	@$(DEV) true
	@$(BROWSER) python -m pytest -m external tests/parallax/serving/test_app_page.py tests/parallax/serving/test_app_page_chat.py

# torch is in no lock: what of it fits depends on the machine.
test-bench: ## test benchmark.py against torch (needs pip install -e ".[bench]" in .venv-3.11)
	@$(DEV) python -m pytest -m external tests/scripts/benchmarks

test-parity: ## compare imported models to transformers on torch, which it installs the first time
	@$(DEV) python -c "import importlib.util as u; exit(not all(map(u.find_spec, ('torch', 'lm_eval', 'peft'))))" || $(DEV) .ci/add-extra parity
	@$(DEV) python -m pytest -m external $(TEST_FLAGS) tests/parallax/interop/test_llama_parity.py tests/parallax/interop/test_experts_parity.py tests/parallax/interop/test_peft_parity.py tests/parallax/tokenizers/test_chat_parity.py

test-eval: ## compare scores in tasks of lm_eval to those of its own backends, on torch
	@$(DEV) true
	@$(EVAL) python -c "import importlib.util as u; exit(not all(map(u.find_spec, ('torch', 'lm_eval', 'peft'))))" || $(DEV) .ci/add-extra parity
	@$(DEV) python -m pytest -m external tests/scripts/evaluation/test_harness.py

test-terraform: ## test terraform/ (needs terraform, and registry.terraform.io for its providers)
	@command -v terraform >/dev/null || { echo "error: nothing in terraform/ was checked: terraform is not here; install 1.9 or later from developer.hashicorp.com/terraform/install" >&2; exit 2; }
	@$(DEV) python -m pytest -m external tests/test_terraform.py

lint: ## check style, format, security (ruff), types (pyright), shell (shellcheck), workflows (zizmor)
	@$(DEV) python -m ruff check .
	@$(DEV) python -m ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(DEV) python -m pyright
	@$(DEV) shellcheck .ci/* scripts/launching/host.sh tests/scripts/fake_host.sh
	@$(DEV) zizmor --offline --strict-collection --quiet .github/workflows

clean: ## remove environments and caches; runs/ stays
	rm -rf .venv-* build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## resolve the locks again (needs uv); UPGRADE=--upgrade takes newer releases
	@command -v uv >/dev/null || { echo "error: make lock needs uv, which is not here; try pipx install uv" >&2; exit 2; }
	$(COMPILE) --output-file requirements.lock
	earlier="--constraints requirements.lock"; for extra in $(EXTRAS); do \
	  $(COMPILE) --extra $$extra $$earlier --output-file requirements-$$extra.lock || exit 1; \
	  earlier="$$earlier --constraints requirements-$$extra.lock"; \
	done
