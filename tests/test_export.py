"""Runs out: what transformers and PEFT load is what was trained."""

import json
import os

import jax
import numpy as np
import pytest
import tiny
from psc_exports import _modules_cache  # noqa: F401
from test_families import hf_model
from test_weights import hf_logits

from rope_jax import config, export, presets, resolve
from rope_jax.data import tokenizer
from rope_jax.export import files, origin
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama, unembedding
from rope_jax.train import loop, sharding, state
from rope_jax.weights.source import open_source

ALL = ("q", "k", "v", "o", "gate", "up", "down")
TOKENS = tiny.tokens(2, 100)


def extended(path, name, **changes):
  """A checkpoint of a family and a config that extends it, with random adapters."""
  hf_model(name).save_pretrained(path)
  c = presets.pretrained(str(path))
  c.rope.context, c.rope.scaling = 4 * c.rope.original_context, "yarn"
  if name == "phi3":
    c.rope.scaling = "longrope"
  c.lora.rank, c.tokenizer, c.train.trainable = 4, "byte", "adapters"
  c.model.update(block_q=16, block_k=32)
  for key, value in changes.items():
    *blocks, last = key.split("__")
    block = c
    for part in blocks:
      block = block[part]
    block[last] = value
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    variables = state.initial_variables(c, mesh, "")
  rng = np.random.default_rng(0)
  for name in set(variables) - {"params"}:
    scale = dict(lora=0.1, phase=0.3)[name]
    variables[name] = jax.tree.map(
      lambda x, scale=scale: (scale * rng.normal(size=x.shape)).astype(x.dtype), variables[name]
    )
  return c, variables


def logits(c, variables, tokens=TOKENS):
  model = Llama(from_config(c))
  hidden = jax.jit(model.apply)(variables, tokens, resolve.rope(c, tokens.shape[1]))
  return np.asarray(hidden @ unembedding(variables["params"]))


def transformers_model(path, **options):
  from transformers import AutoModelForCausalLM

  model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
  assert not any(report.values()), report
  return model.eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_merged_adapters_give_the_same_logits(tmp_path, name):
  c, variables = extended(tmp_path / "base", name, lora__targets=ALL)
  export.write(c, variables, str(tmp_path / "out"))
  theirs = hf_logits(transformers_model(tmp_path / "out"), TOKENS)
  np.testing.assert_allclose(logits(c, variables), theirs, atol=1e-4)
  zero = variables | dict(lora=jax.tree.map(np.zeros_like, variables["lora"]))
  assert np.abs(logits(c, zero) - theirs).max() > 0.1


def test_a_merge_is_the_same_over_a_mesh(tmp_path):
  c, variables = extended(tmp_path / "base", "llama", lora__targets=ALL, rope__phase="psc")
  export.write(c, variables, str(tmp_path / "one"))
  mesh = tiny.mesh(fsdp=2, context=2, tensor=1)
  with jax.set_mesh(mesh):
    split = jax.device_put(variables, sharding.shardings(mesh, variables))
    export.write(c, split, str(tmp_path / "many"), shard_bytes=20_000)
  assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
  one, many = (open_source(str(tmp_path / name)) for name in ("one", "many"))
  assert one.names() == many.names()
  for name in one.names():
    np.testing.assert_allclose(one.read(name), many.read(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  "name, targets",
  [("llama", ("q", "v")), ("llama", ALL), ("qwen2", ALL), ("qwen3", ALL), ("mistral", ALL)],
)
def test_peft_loads_adapters(tmp_path, name, targets):
  from peft import PeftModel

  c, variables = extended(tmp_path / "base", name, lora__targets=targets)
  export.write(c, variables, str(tmp_path / "out"), format="peft")
  rope = json.loads((tmp_path / "out" / "rope.json").read_text())
  base = transformers_model(str(tmp_path / "base"), **rope)
  model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
  ours = logits(c, variables)
  np.testing.assert_allclose(ours, hf_logits(model, TOKENS), atol=1e-4)
  with model.disable_adapter():
    assert np.abs(hf_logits(model, TOKENS) - ours).max() > 0.1


PHASES = [
  dict(rope__phase="psc"),
  dict(rope__phase="psc", rope__psc__calibration="post", rope__psc__share="heads"),
  dict(rope__phase="psc", rope__psc__share="layers"),
  dict(rope__phase="psc_rotation", rope__psc_rotation__bound=1.0, rope__psc_rotation__share="all"),
]


# All phases with all families: tests/test_modeling.py.
@pytest.mark.parametrize(
  "name, phase",
  [*(("llama", phase) for phase in PHASES), ("qwen2", PHASES[0]), ("qwen3", PHASES[1]),
   ("mistral", PHASES[2]), ("phi3", PHASES[3])],
)  # fmt: skip
def test_psc_and_lora_give_the_same_logits_and_come_back(tmp_path, name, phase):
  import torch

  c, variables = extended(tmp_path / "base", name, **phase)
  made = export.write(c, variables, str(tmp_path / "out"))
  assert "psc-00001-of-00001.safetensors" in made["files"]
  model = transformers_model(tmp_path / "out", trust_remote_code=True)
  np.testing.assert_allclose(logits(c, variables), hf_logits(model, TOKENS), atol=1e-3)
  still = variables | dict(phase=jax.tree.map(np.zeros_like, variables["phase"]))
  assert np.abs(logits(c, variables) - logits(c, still)).max() > 0.1
  prompt = torch.tensor(TOKENS[:, :20], dtype=torch.long)
  options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
  cached, uncached = (model.generate(prompt, use_cache=x, **options) for x in (True, False))
  assert torch.equal(cached, uncached)

  again = presets.pretrained(str(tmp_path / "out"))
  kind = c.rope.phase
  again.rope[kind].share = c.rope[kind].share
  assert again.rope[kind].to_dict() == c.rope[kind].to_dict()
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    imported = state.initial_variables(again, mesh, "")
  jax.tree.map(np.testing.assert_array_equal, imported["phase"], variables["phase"])
  again.rope.phase = "none"
  with pytest.raises(ValueError, match="config.rope.phase='none'.*would be lost"):
    state.check_init(again, "")


# ---- What comes along.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  path = tmp_path_factory.mktemp("exported")
  c = tiny.run_config(str(tiny.text_folder(path / "text")), steps=4, trainable="adapters")
  c.rope.context, c.rope.scaling, c.data.length, c.lora.rank = 256, "yarn", 64, 4
  c.evals.perplexity = config.perplexity(lengths=(64, 128), stride=16, num_samples=2)
  loop.train(c, str(path / "run"))
  made = export.export(c, str(path / "run"), str(path / "out"), base_model="org/name")
  return c, path, made


def test_provenance_holds_the_rope_the_config_and_the_results(exported):
  c, path, made = exported
  facts = json.loads((path / "out" / export.PROVENANCE).read_text())
  given = json.loads(json.dumps(c.to_dict()))
  given["data"]["source"] = "text"  # of the paths of a machine, only the ends are published
  assert facts["config"] == given
  assert facts["rope"] == json.loads(json.dumps(resolve.describe(c)))
  assert facts["results"] == json.loads((path / "run" / "results.json").read_text())
  run_file = json.loads((path / "run" / "run.json").read_text())
  assert facts["text"] == run_file["text"] and facts["step"] == 4
  assert sorted(made["files"]) == sorted(os.listdir(path / "out"))


def test_the_base_of_a_run_that_starts_from_a_run_is_named(exported, tmp_path):
  c, path, _ = exported
  later = c.copy_and_resolve_references()
  later.init_from = "run:run"
  assert origin.of(later, str(path / "later")) == origin.Origin()
  hf_model("llama").save_pretrained(tmp_path / "Base-1B")
  first = presets.pretrained(str(tmp_path / "Base-1B"))
  config.write(first, str(tmp_path / "first"))
  later.init_from = str(tmp_path / "first")
  found = origin.of(later, "")
  assert (found.name, found.retrained) == ("Base-1B", "")
  assert found.hf["model_type"] == "llama"
  export.check(later, found, "peft")
  first.train.steps = 3  # of all parameters
  config.write(first, str(tmp_path / "first"))
  with pytest.raises(ValueError, match="config.init_from.*first' trained it"):
    export.check(later, origin.of(later, ""), "peft")
  with pytest.raises(ValueError, match="config.init_from='run:run'.*it is random"):
    later.init_from = "run:run"
    export.check(later, origin.of(later, str(path / "later")), "peft")


def test_the_model_card_states_what_was_done(exported):
  c, path, _ = exported
  card = (path / "out" / "README.md").read_text()
  results = json.loads((path / "run" / "results.json").read_text())["perplexity"]
  for text in ('base_model: "org/name"', "| method | yarn |", "| steps | 4 |", "| seed | 0 |",
               "rank 4", "| data | text (text ", f"{results['64']['ppl']:.3f}",
               f"{results['128']['ppl']:.3f}"):  # fmt: skip
    assert text in card, text


def test_bytes_are_tokens_in_transformers_too(exported):
  from transformers import AutoTokenizer

  _, path, _ = exported
  theirs = AutoTokenizer.from_pretrained(path / "out")
  ours = tokenizer.load("byte")
  for text in ("Hello,  world!\n\t", "naïve — 日本 🙂", "\x00\x7f", "".join(map(chr, range(256)))):
    ids = ours.encode(text).tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_files_of_the_tokenizer_of_the_base_come_along(tmp_path, exported):
  c, _ = extended(tmp_path / "base", "llama")
  own = json.loads((exported[1] / "out" / "tokenizer_config.json").read_text())
  tokenizer_file = (exported[1] / "out" / "tokenizer.json").read_text()
  for name, value in (
    ("tokenizer.json", tokenizer_file),
    ("tokenizer_config.json", json.dumps(dict(own, model_max_length=9, auto_map={"A": "b.C"}))),
    ("chat_template.jinja", "{{ messages }}"),
    ("generation_config.json", json.dumps(dict(eos_token_id=[3, 4], max_length=50))),
    ("evil.py", "raise SystemExit"),
  ):
    (tmp_path / "base" / name).write_text(value)
  c.tokenizer, c.lora.rank, c.train.trainable = str(tmp_path / "base"), 0, "all"
  text, out = tokenizer.load("", str(tmp_path / "base")), tmp_path / "out"
  _, variables = extended(tmp_path / "other", "llama")
  export.write(c, variables, str(out), text=text)
  assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
  assert (out / "tokenizer.json").read_text() == tokenizer_file
  assert not (out / "evil.py").exists()
  written = json.loads((out / "tokenizer_config.json").read_text())
  assert written["model_max_length"] == c.rope.context and "auto_map" not in written
  generation = json.loads((out / "generation_config.json").read_text())
  assert generation == dict(eos_token_id=[3, 4], max_length=c.rope.context)


# ---- Whole or not at all.


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
  c, variables = extended(tmp_path / "base", "llama")
  monkeypatch.setattr(export.card, "card", lambda *a, **k: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    export.write(c, variables, str(tmp_path / "out"))
  assert os.listdir(tmp_path) == ["base"]


def test_a_directory_that_appears_meanwhile_is_not_overwritten(tmp_path):
  with pytest.raises(ValueError, match="exists already"), files.new_directory(str(tmp_path)):
    pass
  out = tmp_path / "out"
  with pytest.raises(OSError), files.new_directory(str(out)) as directory:
    out.mkdir()
    (out / "own.txt").write_text("mine")
    (tmp_path / directory / "x").write_text("other")
  assert [p.name for p in tmp_path.rglob("*")] == ["out", "own.txt"]


def test_an_export_overwrites_nothing(exported):
  c, path, _ = exported
  before = sorted(os.listdir(path / "out"))
  with pytest.raises(ValueError, match="--out=.*exists already"):
    export.export(c, str(path / "run"), str(path / "out"))
  assert sorted(os.listdir(path / "out")) == before


@pytest.mark.parametrize(
  "changes, options, message",
  [
    (dict(lora__rank=0, train__trainable="all"), dict(format="peft"), "config.lora.rank=0"),
    (dict(rope__phase="psc"), dict(format="peft"), "config.rope.phase='psc'"),
    ({}, dict(format="peft"), "config.init_from=''.*it is random"),
    ({}, dict(step=3), "--step=3: there is no trained run"),
    (dict(train__trainable="all"), dict(format="peft"), "config.train.trainable='all'"),
    (dict(rope__scaling="hope", lora__rank=0), dict(format="zip"), "--format=zip"),
    (dict(rope__scaling="fope"), {}, "mixes frequencies"),
  ],
)
def test_what_has_no_form_there_is_refused_before_anything_is_read(
  tmp_path, changes, options, message
):
  c = tiny.run_config(str(tmp_path), trainable="adapters")
  c.rope.context, c.rope.scaling, c.lora.rank = 256, "yarn", 4
  for key, value in changes.items():
    block, _, name = key.partition("__")
    c[block][name] = value
  with pytest.raises(ValueError, match=message):
    export.export(c, str(tmp_path / "none"), str(tmp_path / "out"), **options)
  assert os.listdir(tmp_path) == []


def test_tensors_are_written_as_the_library_reads_them(tmp_path):
  import ml_dtypes
  from safetensors.numpy import load_file

  rng = np.random.default_rng(0)
  arrays = {"a": rng.normal(size=(3, 5)), "ü": rng.normal(size=7), "empty": np.zeros((0, 4))}
  for dtype in ("float32", "bfloat16"):
    cast = {k: x.astype(getattr(ml_dtypes, dtype, dtype)) for k, x in arrays.items()}
    tensors = [files.Tensor(k, x.shape, dtype, lambda x=x: x) for k, x in cast.items()]
    files.write(str(tmp_path / "x.safetensors"), tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(cast)
    for k, x in cast.items():
      np.testing.assert_array_equal(found[k], x)


def test_a_widened_window_is_not_lost_to_peft(tmp_path):
  c, variables = extended(tmp_path / "base", "mistral", model__window=48)
  export.write(c, variables, str(tmp_path / "out"), format="peft")
  assert json.loads((tmp_path / "out" / "rope.json").read_text())["sliding_window"] == 48


def test_results_of_another_context_are_not_claimed(exported, tmp_path):
  c, path, _ = exported
  longer = c.copy_and_resolve_references()
  longer.rope.context = 512
  export.export(longer, str(path / "run"), str(tmp_path / "out"))
  facts = json.loads((tmp_path / "out" / export.PROVENANCE).read_text())
  assert facts["results"] == {} and facts["rope"]["context"] == 512
  assert "None recorded." in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_taken_from_the_working_directory(tmp_path, monkeypatch):
  """Where there is no workdir, a run.json or results.json that happens to be there is not ours."""
  c, variables = extended(tmp_path / "base", "llama")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "results.json").write_text('{"perplexity": {"64": {"metric": "ppl", "ppl": 1.01}}}')
  (tmp_path / "run.json").write_text("{}")
  export.write(c, variables, "out")
  assert "1.01" not in (tmp_path / "out" / "README.md").read_text()


def test_a_rope_that_changes_is_exported_where_the_cache_is_made_again(tmp_path):
  """Cached generation across the switch of LongRoPE is that of the whole sequence."""
  import torch

  c, variables = extended(tmp_path / "base", "phi3", model__window=50)
  export.write(c, variables, str(tmp_path / "out"))
  model = transformers_model(tmp_path / "out")
  assert model.config.model_type == "phi3"
  prompt = torch.tensor(TOKENS[:, :12], dtype=torch.long)  # the switch is after 16
  options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
  cached, uncached = (model.generate(prompt[:1], use_cache=x, **options) for x in (True, False))
  assert torch.equal(cached, uncached)
  export.write(c, variables, str(tmp_path / "frozen"), freeze=True)
  frozen = json.loads((tmp_path / "frozen" / "config.json").read_text())
  assert frozen["model_type"] == "mistral"
  assert frozen["rope_parameters"]["short_factor"] == frozen["rope_parameters"]["long_factor"]


def test_code_beside_the_modelling_file_is_not_run(tmp_path):
  from rope_jax.export import verify

  c, variables = extended(tmp_path / "base", "llama", rope__phase="psc")
  text = tokenizer.load("byte")
  c.tokenizer = "byte"
  export.write(c, variables, str(tmp_path / "out"), text=text)
  file = tmp_path / "out" / "config.json"
  hf = json.loads(file.read_text())
  (tmp_path / "out" / "evil.py").write_text("raise SystemExit('executed')")
  file.write_text(json.dumps(hf | dict(auto_map=hf["auto_map"] | dict(AutoModel="evil.M"))))
  with pytest.raises(ValueError, match="it is not run"):
    verify.verify(str(tmp_path / "out"), 20)
  file.write_text(json.dumps(hf))
  with open(tmp_path / "out" / export.MODELLING, "a") as f:
    f.write("raise SystemExit('executed')")
  with pytest.raises(ValueError, match="it is not run"):
    verify.verify(str(tmp_path / "out"), 20)


def test_layers_with_phases_of_their_own_are_not_read_as_one(tmp_path):
  c, variables = extended(tmp_path / "base", "llama", rope__phase="psc")
  export.write(c, variables, str(tmp_path / "out"))
  again = presets.pretrained(str(tmp_path / "out"))
  again.rope.psc.share = "layers"
  mesh = tiny.mesh()
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="config.rope.psc.share"):
    state.initial_variables(again, mesh, "")
