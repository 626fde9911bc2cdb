"""launch/convert.py as its users run it."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from test_families import hf_model

from rope_jax import config, export, presets
from rope_jax.train import loop


def convert(*args, cwd=ROOT):
  command = [sys.executable, str(ROOT / "launch" / "convert.py"), *map(str, args)]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("convert")
  c = tiny.run_config(tiny.text_folder(path / "text"), trainable="adapters")
  c.rope.context, c.rope.scaling, c.rope.resonance = 256, "yarn", True
  c.data.length, c.lora.rank = 64, 4
  c.evals.perplexity = config.perplexity(lengths=(64,), protocol="truncate", num_samples=2)
  loop.train(c, str(path / "run"))
  for name in os.listdir(path / "text"):  # the text need not be there any more
    os.remove(path / "text" / name)
  return path


def test_a_run_is_exported_and_verified(run, tmp_path):
  done = convert("export", f"--workdir={run / 'run'}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert "in " + str(tmp_path / "out") in done.stdout and "model.safetensors" in done.stdout
  assert not done.stderr.strip() or "exporting" in done.stderr
  done = convert("verify", tmp_path / "out", "--tokens=200")
  assert done.returncode == 0, done.stderr
  ratio = float(done.stdout.split("(ratio ")[1].split(")")[0])
  assert abs(ratio - 1) < 1e-4
  done = convert("show", tmp_path / "out", "--json")
  shown = json.loads(done.stdout)
  assert shown["rope"]["methods"][0][0] == "longrope" and shown["model"]["num_layers"] == 2
  card = (tmp_path / "out" / "README.md").read_text()
  assert "| resonance (whole wavelengths) | yes |" in card and "| steps | 6 |" in card


def test_an_earlier_checkpoint_is_exported_without_the_results_of_the_last(run, tmp_path):
  workdir = f"--workdir={run / 'run'}"
  done = convert("export", workdir, "--step=3", "--shard_gb=1e-5", f"--out={tmp_path / 'a'}")
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / "a" / "rope_jax.json").read_text())
  assert facts["step"] == 3 and facts["results"] == {}
  assert "| steps | 3 of 6 |" in (tmp_path / "a" / "README.md").read_text()
  assert "model.safetensors.index.json" in os.listdir(tmp_path / "a")
  done = convert("export", workdir, "--step=4", f"--out={tmp_path / 'b'}")
  assert done.returncode == 2 and "step" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_is_shown_and_imported(tmp_path):
  hf_model("qwen3").save_pretrained(tmp_path / "base")
  done = convert("show", tmp_path / "base")
  assert done.returncode == 0, done.stderr
  assert "qk_norm True" in done.stdout and "presets.pretrained" in done.stdout
  out = tmp_path / "new" / "out"
  done = convert("import", tmp_path / "base", f"--out={out}", "--notokenizer", "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize(
  "args, message",
  [
    ([], "expected one of show, export, verify, import"),
    (["melt"], "melt: expected one of"),
    (["show"], "show: name one checkpoint"),
    (["show", "/nowhere"], "no such checkpoint"),
    (["export", "--out=x"], "give --workdir of a run, or --config"),
    (["export", "--workdir=/nowhere", "--out=x"], "holds no run"),
    (["export", "--config=configs/smollm2_16k.py"], "--out: name the directory"),
    (["export", "--config=configs/quickstart.py", "--out=x"], "--workdir=DIR/NAME"),
    (["import", "x", "--out=x", "--step=3"], "--step: import does not use it"),
    (["show", "x", "--workdir=x"], "--workdir: show does not use it"),
    (["export", "more", "--out=x"], "unexpected arguments"),
    (["export", "--config=configs/smollm2_16k.py", "--out=tests"], "--out=tests exists already"),
    (["export", "--config=configs/smollm2_16k.py:scaling=fope,rank=0,phase=none", "--out=x"],
     "mixes frequencies"),
    (["import", "tests", "--out=x"], "config.json"),
    (["verify", "tests"], "no export"),
  ],
)  # fmt: skip
def test_bad_arguments_are_one_line(args, message):
  done = convert(*args)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert not (ROOT / "x").exists()


@pytest.mark.slow
def test_a_gguf_file_becomes_a_directory_with_its_tokenizer_and_chat_template(tmp_path):
  from transformers import AutoTokenizer

  ours = tiny.smollm2_tokenizer()  # skips where there is no such file
  c = presets.pretrained("smollm2-135m")
  export.export(c, "", str(tmp_path / "out"), dtype="bfloat16", shard_bytes=10**8)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
  theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
  for text in ("def f(x):\n    return 12345\n", "naïve — 日本 🙂  two", "<|im_start|>user"):
    ids = ours.encode(text).tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
  chat = theirs.apply_chat_template([dict(role="user", content="Hi")], tokenize=False)
  assert chat.startswith("<|im_start|>system") and "<|im_start|>user\nHi<|im_end|>" in chat
  assert theirs.model_max_length == 8192
  again = presets.pretrained(str(tmp_path / "out"))
  assert again.model.to_dict() == c.model.to_dict()
  assert again.rope.to_dict() == c.rope.to_dict()
