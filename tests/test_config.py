import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from conftest import ROOT
from ml_collections import ConfigDict

from rope_jax import config, resolve, rope, validate
from rope_jax.evals import EVALS

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
ARGUMENTS = {
  "smollm2_16k": ["scaling=pi,phase=none", "scaling=none,phase=none,rank=0", "runlocal"],
  "posgen": [
    "task=semi_recursive,scaling=yarn,resonance=True",
    "task=cot,scaling=yarn,yarn=test_only,yarn_length=257,mode=combinations,layers=6",
    "task=recursive,scaling=pi,yarn=test_only,runlocal",
  ],
  "extend": ["context=65536,scaling=longrope2,phase=psc,rank=16,runlocal", "runlocal"],
  "longrope": ["runlocal"],
  "search_tiny": ["seed=1", "runlocal"],
  "smollm2_search": ["method=longrope2,samples=2"],
  "psc_64k": ["scaling=pi", "phase=none,rank=72", "scaling=ntk"],
}


def load(path, arg=None):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg) if arg is not None else module.get_config()


def built():
  for path in CONFIGS:
    yield pytest.param(path, None, id=path.stem)
    for arg in ARGUMENTS.get(path.stem, []):
      yield pytest.param(path, arg, id=f"{path.stem}:{arg}")


@pytest.mark.parametrize("path, arg", built())
def test_every_config_is_valid_and_says_what_it_is(path, arg):
  assert path.stem in ast.get_docstring(ast.parse(path.read_text())) and "python launch/" in (
    path.read_text()
  )
  for c in config.runs(load(path, arg)).values():
    if c.model.attention == "splash":  # for slices; their weights are not on every machine
      named = [p for p in (c.init_from, c.search.init_from) if p and not p.startswith("run:")]
      if set(named) - {"smollm2-135m"}:
        with pytest.raises(ValueError, match=r"config.(search.)?init_from"):
          validate.validate(c, "tpu")
      validate.validate(c, "tpu", inputs=False)
    else:
      validate.validate(c)


def test_configs_import_only_rope_jax():
  for path in CONFIGS:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        assert {n.split(".")[0] for n in names} == {"rope_jax"}, path


def test_psc_64k_is_the_released_recipe():
  c = load(ROOT / "configs" / "psc_64k.py")
  t, r = c.train, c.rope
  assert (r.scaling, resolve.factor(c), r.context, r.original_context) == ("yarn", 16, 65536, 4096)
  assert (r.phase, r.psc.calibration, r.psc.init) == ("psc", "pre", "released")
  assert (c.lora.rank, c.lora.alpha, c.lora.targets) == (8, 16.0, ("q", "k", "v", "o"))
  assert (t.batch_size, t.learning_rate, t.schedule, t.warmup_steps) == (16, 2e-4, "constant", 20)
  assert (t.steps, t.weight_decay, t.clip, t.trainable) == (3000, 0.0, 1.0, "adapters")
  assert (c.data.packing, c.data.append_eos, c.seed) == ("document", False, 42)


def test_rank_matched_control_has_as_many_parameters():
  psc = rope.psc_parameter_count(32, 32, 32, 128)
  lora = {rank: 4 * 2 * 4096 * rank * 32 for rank in (8, 72)}
  assert lora[8] + psc == lora[72]


def leaves(c, prefix=""):
  for key in c:
    if isinstance(c[key], ConfigDict):
      yield from leaves(c[key], f"{prefix}{key}.")
    else:
      yield prefix + key


def test_every_key_is_read():
  """By name, somewhere in the package other than where it is given its default."""
  read = set()
  for path in (ROOT / "rope_jax").rglob("*.py"):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
  c = config.base()
  c.evals.update({kind: entry() for kind, entry in config.ENTRIES.items()})
  # Options of methods go to the function of that name, by its signature.
  methods = {f"rope.{name}" for name in (*rope.SCALINGS, *resolve.PHASES)}
  unread = [
    key for key in leaves(c)
    if key.rpartition(".")[2] not in read and key.rpartition(".")[0] not in methods
  ]  # fmt: skip
  assert not unread


def test_method_options_reach_the_method():
  c = config.base()
  c.model.head_dim = 128
  c.rope.update(scaling="yarn", context=8192)
  plain = resolve.rope(c)
  for key, value in dict(
    beta_fast=16.0, beta_slow=2.0, truncate=False, ramp="rotation", attention_factor=1.5
  ).items():
    changed = config.base()
    changed.model.head_dim = 128
    changed.rope.update(scaling="yarn", context=8192)
    changed.rope.yarn[key] = value
    r = resolve.rope(changed)
    assert (r.inv_freq != plain.inv_freq).any() or r.attention_scale != plain.attention_scale


def test_resonance_is_applied_last():
  c = config.base()
  c.rope.update(scaling="yarn", context=8192, resonance=True)
  assert [name for name, _ in resolve.rope(c).history] == ["yarn", "resonance"]


def change(c, key, value):
  block = c
  *parents, leaf = key.split(".")
  for parent in parents:
    block = block[parent]
  block[leaf] = value


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rope.scaling": "yorn"}, "rope.scaling='yorn'.*'yarn'"),
    ({"rope.phase": "pcs"}, "rope.phase='pcs'"),
    ({"rope.context": 32}, "rope.context=32.*original_context=64"),
    ({"rope.scaling": "pi"}, "rope.context=64.*above"),
    ({"rope.scaling": "pi", "rope.factor": 0.5}, "rope.factor=0.5"),
    ({"rope.factor": 2.0}, "rope.factor=2.0.*scaling='none'"),
    ({"rope.theta": 0.5}, "theta.*0.5"),
    ({"rope.yarn.beta_fast": 8.0}, "rope.yarn.beta_fast=8.0.*scaling='none'"),
    ({"rope.psc.calibration": "post"}, "rope.psc.calibration='post'"),
    ({"rope.psc.init": "huge", "rope.phase": "psc"}, "rope.psc.init='huge'"),
    ({"model.head_dim": 15}, "model.head_dim=15"),
    ({"model.num_kv_heads": 3}, "model.num_heads=4.*num_kv_heads=3"),
    ({"model.remat": "some"}, "model.remat='some'"),
    ({"model.attention": "flash"}, "model.attention='flash'"),
    ({"model.dtype": "float16"}, "model.dtype='float16'"),
    ({"model.num_layers": 0}, "model.num_layers=0"),
    ({"lora.rank": -1}, "lora.rank=-1"),
    ({"lora.targets": ("q", "x")}, "lora.targets='x'"),
    ({"train.trainable": "lora"}, "train.trainable='lora'"),
    ({"train.trainable": "adapters"}, "train.trainable='adapters'.*no adapter"),
    ({"train.schedule": "step"}, "train.schedule='step'"),
    ({"train.accumulation": 3}, "train.batch_size=4.*accumulation=3"),
    ({"train.warmup_steps": 6}, "train.warmup_steps=6.*steps=6"),
    ({"train.learning_rate": 0.0}, "train.learning_rate=0.0"),
    ({"data.packing": "tight"}, "data.packing='tight'"),
    ({"data.length": 128}, "data.length=128.*context=64"),
    ({"data.source": "/nowhere"}, "data.source='/nowhere'"),
    ({"data.text_key": "book"}, "data.text_key='book'"),
    ({"init_from": "/nowhere"}, "init_from='/nowhere'"),
    ({"tokenizer": ""}, "tokenizer=''"),
    ({"tokenizer": "/nowhere"}, "tokenizer='/nowhere'"),
    ({"evals.perplexity.protocol": "slide"}, "evals.perplexity.protocol='slide'"),
    ({"evals.perplexity.lengths": (32, 128)}, r"evals.perplexity.lengths=\(32, 128\).*context=64"),
    ({"evals.perplexity.lengths": ()}, r"evals.perplexity.lengths=\(\)"),
    ({"evals.perplexity.files": "/no/*.txt"}, "evals.perplexity.files='/no/"),
    ({"evals.perplexity.stride": 33}, "evals.perplexity.stride=33"),
    ({"evals.perplexity.document_tokens": 63}, "evals.perplexity.document_tokens=63"),
    ({"evals.perplexity.type": "ppl"}, "evals.perplexity.type='ppl'"),
    ({"evals.perplexity.files": "tfds:pg19"}, "evals.perplexity.files='tfds:pg19'.*SPLIT"),
    ({"train.clip": -1.0}, "train.clip=-1.0"),
    ({"train.b2": 5.0}, "train.b2=5.0"),
    ({"train.warmup_steps": -5}, "train.warmup_steps=-5"),
    ({"train.final_learning_rate": 0.1}, "train.final_learning_rate=0.1.*constant"),
    ({"model.norm_eps": -1.0}, "model.norm_eps=-1.0"),
    ({"model.block_q": -1}, "model.block_q=-1"),
    ({"model.attention": "splash"}, "model.attention='splash'.*'blockwise' on cpu"),
    ({"model.attention": "splash_interpret"}, "model.block_q=16.*multiple of 128"),
    ({"model.context_parallel": "both"}, "model.context_parallel='both'.*all_gather"),
    ({"mesh.context": 0}, "mesh.context=0.*-1"),
    ({"mesh.data": -2}, "mesh.data=-2.*-1"),
    ({"mesh.tensor": 0}, "mesh.tensor=0.*at least 1"),
    ({"model.param_dtype": "bfloat16"}, "model.param_dtype='bfloat16'"),
    ({"data.min_tokens": -3}, "data.min_tokens=-3"),
    ({"seed": -1}, "seed=-1"),
    ({"lora.rank": 4, "lora.targets": ()}, "lora.targets"),
    ({"checkpoint.keep": 0}, "checkpoint.keep=0"),
    ({"rope.partial_rotary_factor": 0.2}, "partial_rotary_factor=0.2"),
    ({"rope.phase": "psc", "rope.psc.share": "some"}, "rope.psc.share='some'"),
    ({"rope.psc_rotation.bound": 1.0}, "rope.psc_rotation.bound=1.0.*phase='none'"),
    ({"rope.phase": "psc_rotation", "rope.psc_rotation.bound": -1.0}, "rope.psc_rotation.bound"),
    ({"rope.scaling": "longrope", "rope.context": 128}, "longrope.long_factor.*8 pairs"),
    (
      {"rope.scaling": "longrope", "rope.context": 128, "rope.longrope.factors": "no.json"},
      "rope.longrope.factors='no.json'.*no factors",
    ),
    (
      {
        "rope.scaling": "longrope",
        "rope.context": 128,
        "rope.longrope.factors": "no.json",
        "rope.longrope.long_factor": (2.0,) * 8,
      },
      "rope.longrope.long_factor",
    ),
    (
      {
        "rope.scaling": "longrope",
        "rope.context": 128,
        "rope.longrope.long_factor": ((2.0,) * 8,) * 3,
      },
      "rope.longrope.*3 rows.*num_layers=2",
    ),
    ({"rope.scaling": "dynamic_yarn"}, "rope.context=64.*nothing"),
    ({"rope.scaling": "hope", "rope.factor": 2.0}, "rope.factor=2.0.*'hope' uses no factor"),
    ({"data.positions": "some"}, "data.positions='some'"),
    ({"data.positions": "pose"}, "data.length=64.*context=64"),
    (
      {"data.positions": "pose", "rope.context": 128, "data.length": 64},
      "data.packing='pack'.*'document'",
    ),
    ({"data.positions": "e2_llm"}, "rope.scaling='none'.*'pi'"),
    (
      {"data.positions": "e2_llm", "rope.scaling": "pi", "rope.context": 128},
      "data.length=128.*original_context=64",
    ),
    ({"data.positions": "mixed"}, "rope.scaling='none'"),
    ({"data.positions": "clex"}, "data.positions='clex'.*scaling='clex'"),
    ({"rope.scaling": "clex", "rope.context": 128}, "data.positions='sequential'.*'clex'"),
  ],
  ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_bad_settings_are_refused_by_key(tmp_path, changes, message):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text", documents=1))
  validate.validate(c)
  for key, value in changes.items():
    change(c, key, value)
  with pytest.raises(ValueError, match=f"config.{message}|config.rope: .*{message}"):
    validate.validate(c)


def test_keys_cannot_be_misspelt():
  c = config.base()
  with pytest.raises((AttributeError, KeyError), match="scalng"):
    c.rope.scalng = "pi"
  with pytest.raises((AttributeError, KeyError), match="length"):
    config.perplexity(length=(5,))


def test_a_comparison_runs_in_its_order_and_not_by_name():
  first, second = config.base(), config.base()
  second.init_from = "run:zero"
  c = config.comparison(zero=first, one=second)
  assert list(config.runs(c)) == ["zero", "one"]
  for order, message in (
    (("one", "zero"), "runs.one.init_from='run:zero'.* in config.order: there is none"),
    (("zero", "two"), "order='two'"),
  ):
    c.order = order
    with pytest.raises(ValueError, match=message):
      config.runs(c)


def test_arguments_are_typed_and_known():
  arg = config.arguments("rank=16,runlocal", rank=8, scaling="yarn", runlocal=False)
  assert (arg.rank, arg.scaling, arg.runlocal) == (16, "yarn", True)
  with pytest.raises(ValueError, match="'rnk'.*rank"):
    config.arguments("rnk=4", rank=8)
  with pytest.raises(ValueError, match="rank='x'.*int"):
    config.arguments("rank=x", rank=8)


def test_evaluations_are_known_by_modules_that_exist():
  for module in EVALS.values():
    assert callable(importlib.import_module(module).evaluate)


def launch(script, *args):
  return subprocess.run(
    [sys.executable, ROOT / "launch" / script, *args], capture_output=True, text=True, cwd=ROOT
  )


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config=configs/quickstart.py", "--config.runs.pretrain.train.stps=1"], "train.stps=1"),
    (["--config=configs/quickstart.py", "--config.runs.untouched.rope.scaling=yorn"],
     "config.runs.untouched.rope.scaling='yorn'"),
    (["--config=configs/quickstart.py", "--config.runs.yarn_lora.rope.factor=0.1"],
     "config.runs.yarn_lora.rope.factor=0.1"),
    (["--config=configs/quickstart.py", "--config.runs.yarn_lora.rope.context=64"],
     "config.runs.yarn_lora.rope.context=64"),
    (["--config=configs/psc_64k.py"], "config.model.attention='splash': expected 'blockwise' on"),
    (["--config=configs/psc_64k.py", "--config.model.attention=blockwise"],
     "config.init_from='Llama-2-7b-hf'"),
    (["--config=configs/psc_64k.py:phse=none"], "'phse'"),
    (["--config=configs/nothing.py"], "nothing.py"),
    (["--config=configs/quickstart.py", "--config.rope.scaling=pi"],
     "--config.rope.scaling=pi: the config is a comparison: --config.runs.NAME.KEY, NAME one of"),
    (["--config=configs/quickstart.py", "--config.runs.yarn.rope.scaling=pi"],
     "NAME one of pretrain, untouched,"),
    (["--config=configs/quickstart.py", "--config.runs.pretrain.train.steps=many"], "many"),
    ([], "--config"),
  ],
)  # fmt: skip
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_entry_points_fail_with_one_line_before_anything_heavy(tmp_path, script, args, message):
  done = launch(script, *args, f"--workdir={tmp_path}/run")
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run").exists()


def test_validation_imports_nothing_heavy():
  code = """
import sys
from rope_jax import config, validate
c = config.base()
c.tokenizer = "byte"
validate.validate(c)
print([m for m in ("flax", "orbax", "optax", "tensorflow_datasets") if m in sys.modules])
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done


def test_methods_need_a_longer_context_only_where_they_stretch():
  for name in rope.SCALINGS:
    c = config.base()
    c.model.head_dim = 128
    c.rope.scaling = name
    stretches = {"factor", "seq_len"} & set(tiny.parameters(name)) and name != "proportional"
    if stretches:
      with pytest.raises(ValueError, match="would do nothing"):
        resolve.rope(c)
    else:
      assert resolve.rope(c).context == 4096


def test_factors_come_from_the_file_that_the_config_names(tmp_path):
  (tmp_path / "f.csv").write_text("1,1.5,2,2.5,3,3.5,4,4")
  c = config.base()
  c.rope.update(scaling="longrope", context=16_384)
  c.rope.longrope.factors = str(tmp_path / "f.csv")
  base = resolve.base(c).inv_freq
  np.testing.assert_allclose(base / resolve.rope(c).inv_freq, [1, 1.5, 2, 2.5, 3, 3.5, 4, 4])
  (tmp_path / "f.csv").write_text("1,1,1,1,1,1,1,2\n2,2,2,2,2,2,2,2")
  assert resolve.rope(c).inv_freq.shape == (2, 8)


def test_training_sees_the_rope_that_goes_with_its_positions():
  def made(positions, time=1, **changes):
    c = config.base()
    c.model.head_dim = 128
    c.rope.update(scaling="pi", context=16_384)
    c.rope.update(changes)
    c.data.positions = positions
    c.data.length = 2048
    return resolve.training_rope(c, time)

  base = rope.base(head_dim=128, theta=1e4, original_context=4096)
  same = functools.partial(np.testing.assert_allclose, rtol=1e-15)
  same(made("sequential").inv_freq, base.inv_freq / 4)
  same(made("e2_llm").inv_freq, base.inv_freq)
  same(made("sequential", scaling="dynamic_yarn").inv_freq, base.inv_freq)  # 2,048 tokens
  same(made("pose", scaling="dynamic_yarn").inv_freq,
       rope.dynamic_yarn(base, seq_len=16_384).inv_freq)  # fmt: skip
  mixed = made("mixed")
  same(mixed.inv_freq, base.inv_freq / 4)
  same(mixed.short.inv_freq, base.inv_freq)
  lists = dict(long_factor=(4.0,) * 64, short_factor=(1.5,) * 64)
  mixed = made("mixed", scaling="longrope", longrope=lists)
  np.testing.assert_allclose(base.inv_freq / mixed.short.inv_freq, 1.5)
  assert made("clex", 3, scaling="clex").time == 3


def test_inspect_rope_prints_json_and_nothing_else():
  done = launch("inspect_rope.py", "--config=configs/psc_64k.py", "--json")
  printed = json.loads(done.stdout)
  keys = "inv_freq attention_scale wavelengths scaling factor theta head_dim original_context"
  keys += " context resonance phase critical_pair disturbance"
  assert set(keys.split()) <= set(printed)
  expected = rope.yarn(rope.base(head_dim=128, theta=1e4, original_context=4096), 16)
  assert printed["inv_freq"] == expected.inv_freq.tolist()
  assert printed["attention_scale"] == expected.attention_scale


@pytest.mark.parametrize("scaling", ["longrope2", "dynamic_ntk"])
def test_inspect_rope_says_at_which_length(scaling):
  printed = {}
  for n in (4096, 16_384):
    args = [f"--config=configs/smollm2_16k.py:scaling={scaling},phase=none", f"--seq_len={n}"]
    done = launch("inspect_rope.py", *args, "--json")
    printed[n] = json.loads(done.stdout)
    assert printed[n]["seq_len"] == n
  base = rope.base(head_dim=64, theta=1e5, original_context=8192)
  np.testing.assert_allclose(printed[4096]["inv_freq"], base.inv_freq)
  assert printed[16_384]["inv_freq"] != printed[4096]["inv_freq"]


def test_inspect_rope_draws_and_strict_json_has_no_infinity(tmp_path):
  args = ["--config=configs/smollm2_16k.py:scaling=hope,phase=none", "--json", "--format=svg"]
  done = launch("inspect_rope.py", *args, f"--plot={tmp_path}", "--compare=none,yarn,longrope2")
  assert done.returncode == 0, done.stderr
  printed = json.loads(done.stdout, parse_constant=pytest.fail)
  assert None in printed["wavelengths"] and 0.0 in printed["inv_freq"]
  for name in ("wavelengths", "angles", "disturbance", "score_decay"):
    assert "<svg" in (tmp_path / f"{name}.svg").read_text()
  legend = (tmp_path / "wavelengths.svg").read_text()
  assert all(f"<!-- {name} -->" in legend for name in ("hope", "none", "yarn", "longrope2"))
  refused = launch("inspect_rope.py", *args, "--compare=none")
  assert refused.returncode == 2 and "--plot" in refused.stderr


def test_reproduce_lists_runs_and_refuses():
  assert "dprope-table3" in launch("reproduce.py").stdout
  found = launch("reproduce.py", "resonance-theory").stdout
  assert re.search(r"pre-critical pairs of 64 +\| +46 ", found), found
  done = launch("reproduce.py", "cold-fusion")
  assert done.returncode == 2 and "cold-fusion" in done.stderr and "Traceback" not in done.stderr
