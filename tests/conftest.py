"""Eight virtual CPU devices for the whole suite, chosen before any backend starts."""

import os
import sys
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"  # of the commands that tests start: libtpu is installed, no TPU
os.environ["HF_HUB_OFFLINE"] = "1"  # oracles must not look for a network

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _caches(monkeypatch, tmp_path_factory):
  """Prepared corpora and token caches of the tests, shared between them, not with the user."""
  base = tmp_path_factory.getbasetemp()
  monkeypatch.setenv("ROPE_JAX_DATA", str(base / "data"))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(base / "programs"))


def pytest_collection_modifyitems(items):
  """Slow tests first, so that no worker is left with one at the end."""
  items.sort(key=lambda item: not any(item.get_closest_marker(m) for m in ("long", "slow")))
