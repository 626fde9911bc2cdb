"""Training, saving and loading what the modelling file of exports with a learned phase makes."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from psc_exports import (
  FILE,
  HEAD_DIM,
  LAYERS,
  POST,
  PRE,
  ROTATION,
  SIZES,
  _modules_cache,  # noqa: F401
  export,
  families,
  loaded,
  logits,
  oracle,
  phases,
)
from safetensors.torch import load_file

import rope_jax
from rope_jax.export import modeling_rope_jax

# --- training ---


@families
@phases
def test_training_starts_from_the_identity_and_checkpoints_layers(tmp_path, kind, phase):
  export(tmp_path, kind, phase)
  config = transformers.AutoConfig.from_pretrained(tmp_path / "export", trust_remote_code=True)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
  model.activation_checkpointing_enable()
  tokens = torch.tensor(tiny.tokens(2, 24), dtype=torch.long)
  model(tokens, labels=tokens).loss.backward()
  found = {n: p for n, p in model.named_parameters() if ".phase_" in n}
  assert len(found) == 4 * LAYERS
  for name, p in found.items():
    if name.endswith(".up"):
      assert not p.any() and p.grad.any()
    else:
      assert 0.7 / HEAD_DIM < p.abs().max() <= 1 / HEAD_DIM and not p.grad.any()


def test_adapters_on_the_projections_come_before_the_phase(tmp_path):
  """As in our model; PEFT replaces the modules, so a hook on them would not see the sum."""
  import peft

  export(tmp_path, "llama", PRE)
  lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
  torch.manual_seed(0)
  model = peft.get_peft_model(loaded(tmp_path / "export"), lora).eval()
  tokens = tiny.tokens(2, 24)
  adapted = logits(model, tokens)
  assert np.abs(adapted - logits(loaded(tmp_path / "export"), tokens)).max() > 1e-2
  merged = logits(copy.deepcopy(model).merge_and_unload(), tokens)
  np.testing.assert_allclose(merged, adapted, atol=1e-4)


# --- files ---


@families
@phases
def test_saving_and_loading_gives_the_same_model(tmp_path, kind, phase):
  _, tensors, config = export(tmp_path, kind, phase)
  model = loaded(tmp_path / "export")
  model.save_pretrained(tmp_path / "again")
  assert (tmp_path / "again" / FILE.name).read_bytes() == FILE.read_bytes()
  saved = json.loads((tmp_path / "again" / "config.json").read_text())
  changed = {k for k in config | saved if config.get(k) != saved.get(k)}
  assert changed <= {"transformers_version"}
  written = load_file(tmp_path / "again" / "model.safetensors")
  assert written.keys() == tensors.keys()
  assert all(torch.equal(written[k], x) for k, x in tensors.items())
  tokens = tiny.tokens(2, 24)
  again = loaded(tmp_path / "again")
  np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))


def test_models_made_in_memory_can_be_saved_and_loaded(tmp_path):
  config = modeling_rope_jax.RopeJaxQwen3Config(**SIZES, head_dim=HEAD_DIM, phase=POST)
  model = modeling_rope_jax.RopeJaxQwen3ForCausalLM(config).eval()
  model.save_pretrained(tmp_path / "model")
  tokens = tiny.tokens(1, 9)
  np.testing.assert_array_equal(logits(loaded(tmp_path / "model"), tokens), logits(model, tokens))
  decoder = modeling_rope_jax.RopeJaxQwen3Model(copy.deepcopy(config))
  decoder.save_pretrained(tmp_path / "decoder")
  again = loaded(tmp_path / "decoder", transformers.AutoModel)
  assert all(torch.equal(again.state_dict()[k], x) for k, x in decoder.state_dict().items())


@families
def test_the_decoder_loads_on_its_own(tmp_path, kind):
  export(tmp_path, kind, PRE)
  tokens = torch.tensor(tiny.tokens(2, 24), dtype=torch.long)
  decoder = loaded(tmp_path / "export", transformers.AutoModel)
  with torch.no_grad():
    hidden = decoder(tokens).last_hidden_state
    expected = loaded(tmp_path / "export").model(tokens).last_hidden_state
  np.testing.assert_array_equal(hidden, expected)


def test_bfloat16_tensors_are_read_and_kept(tmp_path):
  _, tensors, config = export(tmp_path, "llama", PRE, dtype=torch.bfloat16)
  tokens = tiny.tokens(2, 24)
  ours = oracle(tensors, config, tokens)
  model = loaded(tmp_path / "export", dtype=torch.float32)
  np.testing.assert_allclose(logits(model, tokens), ours, atol=1e-4)
  half = loaded(tmp_path / "export", dtype=torch.bfloat16)
  assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
  assert np.isfinite(logits(half.float(), tokens)).all()


def test_missing_and_unexpected_tensors_are_reported(tmp_path):
  gone = "model.layers.1.self_attn.phase_k.up"

  def change(tensors):
    tensors["model.layers.0.self_attn.phase_v.up"] = tensors.pop(gone)

  export(tmp_path, "llama", PRE, change=change)
  model, info = loaded(tmp_path / "export", output_loading_info=True)
  assert set(info["missing_keys"]) == {gone}
  assert set(info["unexpected_keys"]) == {"model.layers.0.self_attn.phase_v.up"}
  attention = model.model.layers[1].self_attn
  assert not attention.phase_k.up.any()  # the identity, and what was there is kept
  assert attention.phase_k.down.abs().max() > 0.5


@pytest.mark.parametrize("share", [True, False])
def test_tensors_that_do_not_fit_share_heads_are_refused(tmp_path, share):
  export(tmp_path, "llama", dict(PRE, share_heads=share))
  file = tmp_path / "export" / "config.json"
  config = json.loads(file.read_text())
  config["phase"]["share_heads"] = not share
  file.write_text(json.dumps(config))
  with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
    loaded(tmp_path / "export")


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(phase=None), "no 'phase'"),
    (dict(phase=dict(kind="psc")), "must have exactly the keys"),
    (dict(phase=dict(kind="clex")), "must have exactly the keys"),
    (dict(phase=dict(PRE, bound=1.0)), "must have exactly the keys"),
    (dict(phase=dict(PRE, calibration="both")), "calibration is 'pre' or 'post'"),
    (dict(phase=dict(ROTATION, bound=-1)), "bound is not negative"),
    (dict(base_model_type="qwen2"), "base_model_type='qwen2' is not for RopeJaxLlamaConfig"),
  ],
)
def test_a_phase_that_is_not_understood_is_refused(tmp_path, change, message):
  export(tmp_path, "llama", PRE)
  file = tmp_path / "export" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(ValueError, match=message):
    loaded(tmp_path / "export")


def test_without_trust_nothing_is_loaded(tmp_path):
  export(tmp_path, "llama", PRE)
  for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.AutoConfig):
    with pytest.raises(ValueError, match="trust_remote_code"):
      auto.from_pretrained(tmp_path / "export", trust_remote_code=False)
  shutil.rmtree(tmp_path / "base")
  config = json.loads((tmp_path / "export" / "config.json").read_text())
  del config["auto_map"]  # not even then as a Llama
  (tmp_path / "export" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="rope_jax"):
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=False)


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
try:
  AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as e:
  assert "trust_remote_code" in str(e)
else:
  raise SystemExit("loaded without trust")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "RopeJaxPhi3ForCausalLM"
assert not any(name.split(".")[0] in ("rope_jax", "jax") for name in sys.modules)
"""


def test_a_process_without_rope_jax_loads_the_export_offline(tmp_path):
  export(tmp_path, "phi3", ROTATION)
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  env |= dict(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
  command = [sys.executable, "-c", SCRIPT, str(tmp_path / "export")]
  done = subprocess.run(
    command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def imports(file):
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_file_stands_alone_and_the_package_does_not_import_it():
  assert {x.split(".")[0] for x in imports(FILE)} == {"importlib", "torch", "transformers"}
  package = Path(rope_jax.__file__).parent
  # These ask for torch when they are called: to verify an export, to time a peer.
  theirs = (FILE, FILE.parent / "verify.py", package / "bench/peer.py")
  for file in package.rglob("*.py"):
    if file not in theirs:
      assert not any(FILE.stem in x or x.split(".")[0] == "torch" for x in imports(file)), file
