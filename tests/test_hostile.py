"""Damaged and hostile Hugging Face directories: an error each, and nothing executed."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_families import hf_model

from rope_jax import config, presets, resolve
from rope_jax.train import state
from rope_jax.weights import families
from rope_jax.weights.source import open_source


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  """A checkpoint in three files, and its config."""
  path = tmp_path_factory.mktemp("good")
  hf_model("llama").save_pretrained(path, max_shard_size="30KB")
  assert len(list(path.glob("*.safetensors"))) == 3
  return path, presets.pretrained(str(path))


@pytest.fixture
def copy(good, tmp_path):
  shutil.copytree(good[0], tmp_path / "copy")
  return tmp_path / "copy", good[1].copy_and_resolve_references()


def load(path, c):
  """All that training does with a checkpoint."""
  c.init_from = str(path)
  mesh = tiny.mesh()
  return state.initial_variables(c, mesh, "")["params"]


def edit_json(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(path, number=0):
  return sorted(path.glob("*.safetensors"))[number]


def edit_tensors(path, change):
  """Applies a change to the tensors of the shard that has the norm at the end."""
  for file in path.glob("*.safetensors"):
    tensors = load_file(file)
    if "model.norm.weight" in tensors:
      save_file(change(tensors), file)


class Bomb:
  def __reduce__(self):
    return os.mkdir, ("executed",)


def header_of(size):
  return size.to_bytes(8, "little") + b'{"a":{}}'


def with_header(path, header, data=b""):
  text = json.dumps(header).encode()
  shard(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def without(name):
  return lambda tensors: {k: x for k, x in tensors.items() if k != name}


def tensor(name, x):
  return lambda tensors: tensors | {name: x}


NORM = "model.norm.weight"
DAMAGE = {
  "a shard is empty": (lambda p: shard(p).write_bytes(b""), "damaged"),
  "a shard is cut": (lambda p: shard(p).write_bytes(shard(p).read_bytes()[:-7]), "damaged"),
  "a header is cut": (lambda p: shard(p).write_bytes(shard(p).read_bytes()[:99]), "damaged"),
  "a header reaches beyond the file": (lambda p: shard(p).write_bytes(header_of(10**6)), "damaged"),
  "a header is of 2^63 bytes": (lambda p: shard(p).write_bytes(header_of(2**63)), "damaged"),
  "data reach beyond the file": (
    lambda p: with_header(p, {"a": dict(dtype="F32", shape=[9], data_offsets=[0, 36])}), "damaged"),
  "data overlap": (
    lambda p: with_header(p, {k: dict(dtype="F32", shape=[1], data_offsets=[0, 4]) for k in "ab"},
                          b"1234"), "damaged"),
  "a shape and its bytes disagree": (
    lambda p: with_header(p, {"a": dict(dtype="F32", shape=[2], data_offsets=[0, 4])}, b"1234"),
    "damaged"),
  "a shape overflows": (
    lambda p: with_header(p, {"a": dict(dtype="F32", shape=[2**40, 2**40],
                                        data_offsets=[0, 4])}, b"1234"), "damaged"),
  "a shard is a pickle": (lambda p: shard(p).write_bytes(pickle.dumps(Bomb())), "damaged"),
  "the index names a pickle": (
    lambda p: index(p, NORM, "pytorch_model.bin"), "only safetensors are read"),
  "the index leaves the directory": (lambda p: index(p, NORM, "../x.safetensors"), "not a file of"),
  "the index has an absolute path": (lambda p: index(p, NORM, "/x.safetensors"), "not a file of"),
  "the index has no name": (lambda p: index(p, NORM, ""), "not a file of"),
  "the index has a number": (lambda p: index(p, NORM, 3), "not a file of"),
  "the index names another shard": (lambda p: index(p, NORM, shard(p).name), "is not"),
  "the index names a tensor that is nowhere": (
    lambda p: index(p, "model.new.weight", shard(p).name), "is not"),
  "the index has no map": (
    lambda p: (p / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
  "the index is no JSON": (
    lambda p: (p / "model.safetensors.index.json").write_text("[" * 10**5), "cannot be read"),
  "a shard is missing": (lambda p: shard(p).unlink(), "shards are missing"),
  "a shard is a link to nowhere": (
    lambda p: (shard(p).unlink(), shard(p, 0).with_name("model-00001-of-00003.safetensors")
               .symlink_to("/nowhere")), "shards are missing"),
  "the config is no JSON": (lambda p: (p / "config.json").write_text("{"), "cannot be read"),
  "the config is a list": (lambda p: (p / "config.json").write_text("[]"), "expected an object"),
  "the config is no text": (
    lambda p: (p / "config.json").write_bytes(b"\xff\xfe{}"), "cannot be read"),
  "the config has no size": (
    lambda p: edit_json(p / "config.json", hidden_size=None), "hidden_size"),
  "a size is negative": (lambda p: edit_json(p / "config.json", hidden_size=-1), "hidden_size=-1"),
  "a size is text": (lambda p: edit_json(p / "config.json", vocab_size="61"), "vocab_size='61'"),
  "a size is huge": (lambda p: edit_json(p / "config.json", vocab_size=10**30), "vocab_size=1000"),
  "a rope is unknown": (
    lambda p: edit_json(p / "config.json", rope_parameters=dict(rope_type="spiral")), "spiral"),
  "there are more layers than anyone has": (
    lambda p: edit_json(p / "config.json", num_hidden_layers=2**30), "num_hidden_layers"),
  "a length is huge": (
    lambda p: edit_json(p / "config.json", max_position_embeddings=10**400), "max_position"),
  "there are a whole and an index": (
    lambda p: shard(p).rename(p / "model.safetensors"), "do not agree"),
  "the config is a link to elsewhere": (
    lambda p: ((p / "config.json").rename(p.parent / "x.json"),
               (p / "config.json").symlink_to(p.parent / "x.json")), "link to a file outside"),
  "a shard is a link to elsewhere": (
    lambda p: (shard(p).rename(p.parent / "x.safetensors"),
               (p / "model-00001-of-00003.safetensors").symlink_to(p.parent / "x.safetensors")),
    "link to a file outside"),
  "the weights are quantised": (
    lambda p: edit_json(p / "config.json", quantization_config=dict(bits=4)),
    "quantization_config"),
  "code comes along": (
    lambda p: edit_json(p / "config.json", model_type="mine", auto_map={"AutoModel": "m.M"}),
    "model_type 'mine'"),
  "a phase is none of ours": (
    lambda p: edit_json(p / "config.json", model_type="rope_jax", base_model_type="llama",
                        phase=dict(kind="psc", calibration="never", share_heads=False)), "phase="),
  "the phase is not there": (
    lambda p: edit_json(p / "config.json", model_type="rope_jax", base_model_type="llama",
                        phase=[]), "phase="),
}  # fmt: skip
TENSORS = {
  "a tensor is missing": (without(NORM), "model.norm.weight"),
  "a vector is too long": (tensor(NORM, np.ones(33, np.float32)), "shape.*33"),
  "a matrix is transposed": (
    tensor("lm_head.weight", np.ones((32, 61), np.float32)),
    r"lm_head.weight has shape \(32, 61\)"),
  "a tensor is of whole numbers": (tensor(NORM, np.ones(32, np.int8)), "type I8"),
  "a tensor has a bias that the config does not": (
    tensor("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)), "no place for"),
  "a tensor is of a deeper model": (
    tensor("model.layers.2.input_layernorm.weight", np.ones(32, np.float32)), "no place for"),
  "a tensor is of no kind that we know": (
    tensor("model.norm.weight_scale_inv", np.ones(1, np.float32)), "no place for"),
}  # fmt: skip


def index(path, name, file):
  whole = json.loads((path / "model.safetensors.index.json").read_text())
  whole["weight_map"][name] = file
  (path / "model.safetensors.index.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_when_a_checkpoint_is_opened(copy, what, monkeypatch):
  path, c = copy
  damage, message = DAMAGE[what]
  monkeypatch.chdir(path)
  damage(path)
  with pytest.raises(ValueError, match=message):
    open_source(str(path))
  with pytest.raises(ValueError, match=message):
    load(path, c)
  assert not (path / "executed").exists()


@pytest.mark.parametrize("what", TENSORS)
def test_wrong_tensors_are_found_before_any_is_read(copy, what, monkeypatch):
  path, c = copy
  change, message = TENSORS[what]
  (path / "model.safetensors.index.json").unlink()
  edit_tensors(path, change)
  monkeypatch.setattr(np, "empty", None)  # what weights are read into
  with pytest.raises(ValueError, match=message):
    load(path, c)


def test_a_flipped_bit_in_a_header_is_an_error_or_of_no_account(good, tmp_path):
  """No byte of a header, flipped, gives anything but a ValueError or the same tensors."""
  path, c = good
  files = {f.name: f.read_bytes() for f in path.glob("*.safetensors")}
  expected = {n: open_source(str(path)).read(n) for n in open_source(str(path)).names()}
  shutil.copytree(path, tmp_path / "copy")
  rng, refused = np.random.default_rng(0), 0
  for _ in range(300):
    name = sorted(files)[rng.integers(len(files))]
    data = bytearray(files[name])
    at = rng.integers(8 + int.from_bytes(data[:8], "little"))
    data[at] ^= 1 << rng.integers(8)
    (tmp_path / "copy" / name).write_bytes(data)
    try:
      source = open_source(str(tmp_path / "copy"))
      assert source.names() == set(expected)
      assert all(source.shape(n) == x.shape for n, x in expected.items())
    except ValueError:
      refused += 1
    except AssertionError:
      with pytest.raises(ValueError):  # found by what the model expects
        load(tmp_path / "copy", c.copy_and_resolve_references())
      refused += 1
    (tmp_path / "copy" / name).write_bytes(files[name])
  assert refused > 200


def test_a_config_of_random_values_is_an_error(good, tmp_path):
  path, _ = good
  hf = json.loads((path / "config.json").read_text())
  shutil.copytree(path, tmp_path / "copy")
  values = [None, True, -1, 0, 3, 2**40, 10**400, 1e-3, 1e308, float("inf"), "", "x", [], [1], [[]],
            {}, {"a": 1}]  # fmt: skip
  rng = np.random.default_rng(0)
  keys = [*hf, "use_sliding_window", "max_window_layers", "layer_types", "sliding_window"]
  keys += ["partial_rotary_factor", "original_max_position_embeddings", "rope_theta"]
  ropes = [dict(rope_type=t, factor=2.0) for t in ("linear", "dynamic", "yarn")] + [None]
  for i in range(600):
    hf["model_type"] = families.FAMILIES[i % len(families.FAMILIES)]
    changed = {str(rng.choice(keys)): values[rng.integers(len(values))] for _ in range(2)}
    if rope := ropes[i % len(ropes)]:
      key = ("rope_type", "factor", "rope_theta", "partial_rotary_factor")[rng.integers(4)]
      changed["rope_parameters"] = rope | {key: values[rng.integers(len(values))]}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(hf | changed))
    try:
      c = presets.pretrained(str(tmp_path / "copy"))
      resolve.rope(c)
    except ValueError:
      pass  # anything else is a bug


def test_a_config_must_name_what_it_loads(copy):
  path, c = copy
  c.init_from = str(path)
  c.model.vocab_size = 62
  with pytest.raises(ValueError, match="config.model.vocab_size=62.*61"):
    load(path, c)
  assert isinstance(c, type(config.base()))
