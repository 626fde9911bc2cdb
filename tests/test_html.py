"""The page of results: what is in it, and what a real browser makes of it."""

import json
import re
import subprocess
import sys
from urllib.parse import quote

import browser
import matplotlib.image
import numpy as np
import pytest
import tiny
from conftest import ROOT

from rope_jax import config, figures, html, report, resolve
from rope_jax import results as results_lib

NASTY = """a<b>"'&=+,</script><script>document.title='hit'</script>"""


def value(metric, x, **more):
  return {"metric": metric, metric: x, **more}


def perplexity(ppl, **more):
  def at(n):
    parts = [dict(start=i * n // 4, end=(i + 1) * n // 4, ppl=ppl + i / 8) for i in range(4)]
    return value("ppl", ppl + n / 1e4, stderr=0.25, protocol="truncate", by_position=parts, **more)

  return {str(n): at(n) for n in (128, 256, 1024)}


def passkey(share):
  depths = [dict(depth=d / 4, accuracy=share - d / 100, samples=9) for d in range(5)]
  return {
    str(n): value("accuracy", share, low=share - 0.05, high=min(share + 0.05, 1), threshold=0.8,
                  samples=45, by_depth=depths)
    for n in (128, 256)
  }  # fmt: skip


def ruler(score):
  tasks = {t: value("score", score + d) for t, d in (("niah", 0.0625), ("vt", -0.0625))}
  return {str(n): value("score", score, tasks=tasks) for n in (128, 256)}


# Names out of alphabetical order; one lacks an evaluation, one a column.
RESULTS = {
  "zero": dict(perplexity=perplexity(20.5), passkey=passkey(0.5), ruler=ruler(0.25)),
  "one": dict(perplexity=perplexity(10.5), ruler=ruler(0.5)),
  "a tuned": dict(passkey=passkey(0.9375), perplexity=perplexity(11.5), ruler=ruler(0.75)),
}
del RESULTS["one"]["perplexity"]["1024"]
VALUES = {"acc": value("acc", 0.7, stderr=0.01), "odd": value("word_perplexity", 9.0)}


def bold(dom, heading):
  """{column: runs in bold} of the first table of an evaluation."""
  (section,) = [s for s in dom.all("section") if s["text"].startswith(heading)]
  (table, *_) = [t for t in dom.all("table") if section in t["inside"]]
  head, *rows = [row for row in dom.rows() if table in row[0]["inside"]]
  return {
    c["text"]: {row[0]["text"] for row in rows if row[i].get("class") == "best"}
    for i, c in enumerate(head)
    if i
  }


def page(**options):
  return browser.Dom(html.page(RESULTS, **options))


# ---- What is in the page.


def test_runs_and_evaluations_keep_their_order():
  dom = page()
  assert [e["value"] for e in dom.all("input")] == list(RESULTS)
  assert [e["text"] for e in dom.all("h2")] == ["perplexity", "passkey", "ruler"]
  rows = [row[0]["text"] for row in dom.rows()]
  assert rows[:4] == ["run", "zero", "one", "a tuned"]
  assert html.page(RESULTS) == html.page(json.loads(json.dumps(RESULTS)))


def test_results_files_keep_the_order_in_which_they_were_made(tmp_path):
  config.write_json(str(tmp_path / "results.json"), RESULTS)
  assert list(results_lib.read([tmp_path])[0]) == list(RESULTS)


def test_every_value_is_in_the_page_as_in_the_tables_on_the_screen():
  texts = {e["text"] for e in page().all("td")}
  for by_name in RESULTS.values():
    for by_column in by_name.values():
      for r in by_column.values():
        for cell in (r, *r.get("tasks", {}).values()):
          assert report.cell(cell) in texts
        assert all(f"{p['accuracy']:.2f}" in texts for p in r.get("by_depth", ()))


def test_the_best_of_each_column_is_bold_and_of_perplexity_that_is_the_lowest():
  dom = page()
  assert bold(dom, "perplexity") == {"128": {"one"}, "256": {"one"}, "1,024": {"a tuned"}}
  assert bold(dom, "passkey") == {"128": {"a tuned"}, "256": {"a tuned"}, "holds to": set()}
  alone = browser.Dom(html.page({"": dict(perplexity=perplexity(3.0))}))
  assert bold(alone, "perplexity") == {"128": set(), "256": set(), "1,024": set()}


def test_what_a_run_lacks_is_empty_and_what_it_has_is_in_its_column():
  (one,) = [row for row in page().rows() if row[0]["text"] == "one" and "10.513" in row[1]["text"]]
  assert [c["text"] for c in one] == ["one", "10.513 ± 0.250", "10.526 ± 0.250", ""]
  passkeys = [row[0]["text"] for row in page().rows() if any("[" in c["text"] for c in row)]
  assert passkeys == ["zero", "a tuned"]


def test_names_cannot_bring_html_or_scripts():
  name = NASTY
  column = {name: value(name, 0.5, words=name, tasks={name: value(name, 0.25)},
                        by_position=[{"start": 0, "end": 9, name: 0.5}],
                        by_depth=[{"depth": 0.5, name: 0.5}])}  # fmt: skip
  text = html.page({name: {name: column, "n": {"64": value(name, 0.5), "128": value(name, 1)}}},
                   title=name)  # fmt: skip
  dom = browser.Dom(text)
  assert len(dom.all("script")) == 1 and not dom.all("b") and text.count("</script>") == 1
  assert dom.all("input")[0]["value"] == name and dom.all("h1")[0]["text"] == name
  assert [e["text"] for e in dom.all("h2")] == [name, "n"]


def test_nothing_is_loaded_and_the_policy_forbids_it():
  text = html.page(RESULTS)
  assert not browser.addresses(text) and "://" not in text and len(text) < 1e6
  (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)', text)
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_results_with_tasks_depths_positions_or_none_of_them():
  dom = page()
  assert [e["text"] for e in dom.all("summary")] == ["2 tasks"]
  assert [e["text"] for e in dom.all("figcaption")] == [
    "zero, accuracy by depth", "a tuned, accuracy by depth"
  ]  # fmt: skip
  charts = [e["aria-label"] for e in dom.all("svg") if "aria-label" in e]
  assert charts == ["By length", "By position in 1,024 tokens"] + 2 * ["By length"]
  plain = browser.Dom(html.page({"x": dict(harness=VALUES), "y": dict(harness=VALUES, empty={})}))
  assert not plain.all("figure") and [e["text"] for e in plain.all("h2")] == ["harness"]
  assert "odd perplexity" not in plain.html and "odd <small>word_perplexity" in plain.html
  assert "no evaluations" in html.page({"x": {}})


def test_depths_start_at_the_top_and_colours_do_not_depend_on_the_other_runs():
  def colours(results):
    dom = browser.Dom(html.page(results))
    return {c["text"]: c["style"] for row in dom.rows() for c in row if "style" in c}

  both, one = colours(RESULTS), colours({"zero": RESULTS["zero"]})
  assert one.items() <= both.items() and len(both) > len(one) > 3
  rows = [row for row in page().rows() if row[0]["text"].endswith("%")]
  assert [row[0]["text"] for row in rows[:5]] == ["0%", "25%", "50%", "75%", "100%"]
  assert rows[0][1]["text"] == "0.50" and rows[4][1]["text"] == "0.46"


def test_values_under_different_protocols_are_not_passed_off_as_comparable():
  assert "not comparable" not in html.page(RESULTS)
  other = {"x": RESULTS["zero"], "y": dict(perplexity=perplexity(1.0))}
  for r in other["y"]["perplexity"].values():
    r["protocol"] = "sliding"
  assert "not comparable: protocol truncate (x), sliding (y)" in html.page(other)


def test_values_that_are_not_finite_or_huge_do_not_break_the_page():
  bad = {"64": value("ppl", float("nan"), stderr=float("nan")),
         "128": value("ppl", 1e304, stderr=1e300), "256": value("ppl", float("inf"))}  # fmt: skip
  text = html.page({"bad": dict(p=bad), "good": dict(p=perplexity(9.0))})
  assert "1e+304" in text and len(text) < 1e5
  assert bold(browser.Dom(text), "p") == {
    "64": set(), "128": {"good"}, "256": {"good"}, "1,024": set()
  }  # fmt: skip


def test_runs_that_broke_do_not_flatten_the_others():
  runs = {"a": dict(p=perplexity(7.0)), "b": dict(p=perplexity(7.5))}
  assert html.page(runs).count("without what broke") == 0
  dom = browser.Dom(html.page({**runs, "broke": dict(p=perplexity(900.0))}))
  closer = [e for e in dom.all("svg") if e.get("aria-label", "").endswith("without what broke")]
  assert len(closer) == 2  # by length and by position
  for chart in closer:
    drawn = {e["data-run"] for e in dom.all("g") if chart in e["inside"] and "data-run" in e}
    assert drawn == {"0", "1"}


# ---- From workdirs.


def workdir(path, results, **settings):
  """A workdir with these results; runs of a comparison get directories of their own."""
  path.mkdir()
  for name in results if results_lib.is_comparison(results) else [""]:
    c = config.base()
    c.rope.update(scaling="yarn", context=8192, **settings)
    c.train.steps = 30
    config.write(c, str(path / name), parameters=12345, trained_parameters=678)
    config.write_json(str(path / name / "rope.json"), resolve.describe(c))
    (path / name / "checkpoints" / "20").mkdir(parents=True)
  config.write_json(str(path / "results.json"), results)
  return str(path)


def launch(*args):
  return subprocess.run(
    [sys.executable, ROOT / "launch" / "report.py", *args], capture_output=True, text=True
  )


ENTRY_POINT = """
import runpy, sys
sys.path[:0] = [{root!r} + "/launch", {root!r} + "/tests"]
import tiny
from rope_jax import config
from rope_jax.train import loop

# A model takes its time, and the results are what matters here.
loop.train = lambda c, workdir, profile, keep: config.write(c, workdir) or {results!r}[c.seed]
loop.evaluate = loop.train
sys.argv = [sys.argv[0], "--config=" + __file__, *sys.argv[1:]]

def get_config():
  runs = [tiny.run_config({folder!r}, steps=0) for _ in range(3)]
  for seed, run in enumerate(runs):
    run.seed = seed
  return config.comparison(**dict(zip({names!r}, runs)))

if __name__ == "__main__":
  runpy.run_path({root!r} + "/launch/" + sys.argv.pop(), run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_entry_points_write_figures_and_the_page_in_the_order_of_the_runs(tmp_path, script):
  names = ["zero", "one", "atuned"]  # keys of a config
  code = ENTRY_POINT.format(
    root=str(ROOT),
    folder=tiny.text_folder(tmp_path / "text", documents=1),
    results=list(RESULTS.values()),
    names=names,
  )
  (tmp_path / "c.py").write_text(code)
  out = tmp_path / "out"
  done = subprocess.run(
    [sys.executable, tmp_path / "c.py", f"--workdir={out}", "--report", script],
    capture_output=True,
    text=True,
  )
  figures = [f"{name}.png" for name in ("perplexity", "passkey", "passkey_depths", "ruler")]
  written = [out / name for name in ("results.json", *figures, "report.html")]
  assert done.stdout.split()[-6:] == list(map(str, written)), done.stderr
  assert list(json.loads(written[0].read_text())) == names
  dom = browser.Dom(written[-1].read_text())
  assert [e["value"] for e in dom.all("input")] == names
  assert "0.94 [0.89, 0.99]" in {e["text"] for e in dom.all("td")}


def test_workdirs_side_by_side_with_what_they_say_of_their_runs(tmp_path):
  comparison = workdir(tmp_path / "many", RESULTS)
  alone = workdir(tmp_path / "alone", RESULTS["zero"], resonance=True)
  results, facts = results_lib.read([comparison, alone])
  assert list(results) == ["many/zero", "many/one", "many/a tuned", "alone"] == list(facts)
  assert results["alone"] == RESULTS["zero"] == results["many/zero"]
  assert list(results_lib.read([comparison])[0]) == list(RESULTS)

  done = launch(comparison, alone, f"--output={tmp_path}/r.html")
  assert done.returncode == 0 and done.stdout.strip() == f"{tmp_path}/r.html", done.stderr
  dom = browser.Dom((tmp_path / "r.html").read_text())
  rows = {row[0]["text"]: [c["text"] for c in row[1:]] for row in dom.rows()[:5]}
  heads = "rope factor context phase resonance steps parameters trained"
  assert " ".join(rows["run"]) == heads
  same = ["yarn", "2", "4,096 → 8,192", "none"]
  assert rows["many/one"] == [*same, "no", "20 of 30", "12,345", "678"]
  assert rows["alone"] == [*same, "yes", "20 of 30", "12,345", "678"]
  assert "config.rope.resonance" in dom.html and "config.rope.context" not in dom.html


def test_directories_of_one_name_are_told_apart(tmp_path):
  for parent in "ab":
    (tmp_path / parent).mkdir()
    workdir(tmp_path / parent / "run", RESULTS["zero"])
  paths = [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]
  assert list(results_lib.read(paths)[0]) == paths
  with pytest.raises(ValueError, match="only once"):
    results_lib.read(paths[:1] * 2)


def test_a_directory_without_results_is_one_line_and_exit_2(tmp_path):
  done = launch(str(tmp_path), f"--output={tmp_path}/r.html")
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert str(tmp_path) in done.stderr and "launch/eval.py" in done.stderr
  assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("text", ["{", '{"perplexity": {"128": {"ppl": 3.0}}}', "[1]", '{"x": 1}'])
def test_results_of_another_form_are_refused(tmp_path, text):
  (tmp_path / "results.json").write_text(text)
  with pytest.raises(ValueError, match="results.json is not of this version's form.*eval.py"):
    results_lib.read([str(tmp_path)])


def test_flags_of_the_entry_points_are_refused_in_one_line(tmp_path):
  workdir(tmp_path / "x", RESULTS)
  for args in ([], [f"{tmp_path}/x", f"--output={tmp_path}/no/r.html"]):
    done = launch(*args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


# ---- Figures.


def test_figures_are_written_for_what_has_lengths_and_depths(tmp_path):
  results = {k: {**v, "harness": VALUES} for k, v in RESULTS.items()} | {"empty": {}}
  paths = figures.write(results, str(tmp_path), original_contexts=[128])
  names = ["perplexity.png", "passkey.png", "passkey_depths.png", "ruler.png"]
  assert paths == [str(tmp_path / name) for name in names]
  for path in paths:
    assert matplotlib.image.imread(path)[..., :3].std() > 0.01, "an empty picture"


def test_figures_say_runs_axes_and_depths(tmp_path):
  by_run = results_lib.evaluations(RESULTS)
  figures.by_length(by_run["perplexity"], f"{tmp_path}/l.svg", original_contexts=[128])
  figures.heatmap(by_run["passkey"], f"{tmp_path}/d.svg")
  drawn = (tmp_path / "l.svg").read_text()
  for text in ("zero", "one", "a tuned", "original window", "By position, window of 1,024 tokens"):
    assert f"<!-- {text} -->" in drawn
  cells = (tmp_path / "d.svg").read_text()
  order = [cells.index(f"<!-- {d}% -->") for d in (0, 25, 50, 75, 100)]
  assert order == sorted(order) and cells.count("<!-- 0.50 -->") == 2  # two lengths of zero
  assert "<!-- one -->" not in cells


# ---- In a browser.


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
  return tmp_path_factory.mktemp("browser")


@pytest.fixture
def written(tmp_path):
  path = tmp_path / "report.html"
  path.write_text(html.page({**RESULTS, NASTY: dict(perplexity=perplexity(1.5))}))
  return path


def test_the_script_runs_and_changes_nothing_unasked(written, profile):
  static, dom = browser.Dom(written.read_text()), browser.dom(written, profile)
  assert "data-ready" in dom.all("html")[0] and "data-ready" not in static.all("html")[0]
  for what in ("td", "th"):
    texts = [[(e["text"], e.get("class") or "") for e in d.all(what)] for d in (static, dom)]
    assert texts[0] == texts[1]  # every number, and what is bold
  assert not [e for e in dom.elements if "off" in e.get("class", "").split()]


def test_a_link_hides_runs_everywhere_and_the_next_best_is_bold(written, profile):
  fragment = f"hide=one&hide={quote(NASTY)}"
  dom = browser.dom(written, profile, fragment)
  numbers = {e["value"]: (e["data-toggle"], "checked" in e) for e in dom.all("input")}
  hidden = {numbers["one"][0], numbers[NASTY][0]}
  of_runs = [e for e in dom.elements if "data-run" in e]
  assert {e["tag"] for e in of_runs} >= {"tr", "g", "figure"}
  for e in of_runs:
    assert ("off" in e.get("class", "").split()) == (e["data-run"] in hidden)
  assert bold(browser.dom(written, profile), "perplexity")["128"] == {NASTY}
  assert bold(dom, "perplexity") == {c: {"a tuned"} for c in ("128", "256", "1,024")}


def test_boxes_and_headings_do_what_they_say(written, profile):
  """Clicked by a script of the test, under a policy that lets it run."""
  clicks = """
    const tick = () => new Promise((done) => setTimeout(done, 50));
    (async () => {
      const head = [...document.querySelectorAll("thead button")].slice(0, 2);
      const names = () => [...document.querySelectorAll("tbody")[0].rows]
        .map((row) => row.cells[0].textContent[0]).join("");
      const seen = [names()];
      for (const button of [head[1], head[1], head[1], head[0]]) {
        button.click();
        seen.push(names());
      }
      document.querySelector("nav input").click();
      await tick();
      seen.push(location.hash, String(document.querySelectorAll("tr.off").length > 2));
      document.body.dataset.seen = seen.join(" ");
    })();
  """
  text = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", html.page(RESULTS))
  written.write_text(text.replace("</body>", f"<script>{clicks}</script></body>"))
  seen = browser.dom(written, profile).all("body")[0]["data-seen"].split()
  # As given; by the first column up, down, as given; by name.
  assert seen == ["zoa", "oaz", "zao", "zoa", "aoz", "#hide=zero", "true"]


def test_dark_and_light_are_both_legible(written, profile, tmp_path):
  brightness = {}
  for scheme, flags in (("light", []), ("dark", ["--force-dark-mode"])):
    shot = tmp_path / f"{scheme}.png"
    browser.run(written, profile, *flags, f"--screenshot={shot}", "--window-size=900,700")
    grey = matplotlib.image.imread(shot)[..., :3].mean(-1)
    brightness[scheme] = np.median(grey)
    assert abs(grey - np.median(grey)).max() > 0.6, f"nothing stands out in {scheme}"
  assert brightness["dark"] < 0.2 and brightness["light"] > 0.8


def test_an_error_in_a_script_would_be_seen(tmp_path, profile):
  (tmp_path / "bad.html").write_text("<script>missing()</script>")
  with pytest.raises(AssertionError, match="missing is not defined"):
    browser.run(tmp_path / "bad.html", profile, "--dump-dom")


def test_without_a_browser_tests_skip_but_in_ci_they_fail(monkeypatch):
  monkeypatch.setenv("PATH", "")
  monkeypatch.delenv("CI", raising=False)
  with pytest.raises(pytest.skip.Exception, match="install"):
    browser.find()
  monkeypatch.setenv("CI", "true")
  with pytest.raises(pytest.fail.Exception, match="install"):
    browser.find()


def test_a_page_shows_the_rope_under_which_the_results_are(tmp_path):
  c = config.base()
  c.rope.context, c.rope.scaling = 2 * c.rope.original_context, "yarn"
  (tmp_path / "rope.json").write_text(json.dumps(resolve.describe(c)))
  assert results_lib.facts(str(tmp_path))["rope"]["factor"] == 2
  c.rope.context *= 2  # evaluated further out than it was trained
  (tmp_path / "results_rope.json").write_text(json.dumps(resolve.describe(c)))
  assert results_lib.facts(str(tmp_path))["rope"]["factor"] == 4
