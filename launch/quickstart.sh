#!/usr/bin/env bash
# Sets up .venv if there is none, installs rope_jax, and runs the quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
install_once ""
exec "$python" launch/train.py --config=configs/quickstart.py "$@"
