"""Figures of ropes and of results by position: they show the numbers, and leave pyplot alone."""

import subprocess
import sys

import numpy as np
import pytest

from rope_jax import figures, plots, rope

BASE = rope.base(head_dim=32, theta=1e4, original_context=64)
ROPES = dict(none=BASE, pi=rope.pi(BASE, 4.0), resonance=rope.resonance(BASE))


def curves(figure) -> dict:
  """{name: (values, colour)} of the ropes in the first panel."""
  lines = figure.axes[0].get_lines()
  named = {line.get_label().partition(",")[0]: line for line in lines}
  return {n: (np.asarray(x.get_ydata()), x.get_color()) for n, x in named.items() if n in ROPES}


def test_figures_show_the_numbers_of_the_algebra():
  drawn = curves(plots.feature_gaps(ROPES, length=256))
  for name, r in ROPES.items():
    np.testing.assert_allclose(drawn[name][0], np.degrees(rope.feature_gap(r, 256)))
  assert drawn["resonance"][0][0] < 1e-9 < 1 < drawn["none"][0][0]
  drawn = curves(plots.disturbances(BASE, ROPES, length=256))
  np.testing.assert_allclose(drawn["pi"][0], rope.disturbance(ROPES["pi"], BASE, 256))
  drawn = curves(plots.wavelengths(ROPES))
  np.testing.assert_allclose(drawn["pi"][0], 4 * BASE.wavelengths)


def test_no_gap_is_cut_off_by_the_figure():
  low, high = plots.feature_gaps(ROPES, length=256).axes[0].get_ylim()
  assert low < 0 and high > 180


def test_a_rope_has_the_same_colour_in_all_figures():
  drawn = [
    curves(plots.wavelengths(ROPES)),
    curves(plots.disturbances(BASE, ROPES, length=256)),
    curves(plots.feature_gaps(ROPES, length=256)),
    curves(plots.score_decay(ROPES, length=256)),
  ]
  for name in ROPES:
    assert len({figure[name][1] for figure in drawn}) == 1
  assert len({colour for _, colour in drawn[0].values()}) == len(ROPES)


def _posgen(values):
  parts = [dict(start=4 + i, end=5 + i, accuracy=v, stderr=0.01) for i, v in enumerate(values)]
  return {
    "in distribution": dict(metric="accuracy", accuracy=values[0]),
    "out of distribution": dict(metric="accuracy", accuracy=values[-1], by_position=parts),
  }


def test_values_by_position_are_drawn_without_those_by_length():
  results = dict(one=_posgen([1.0, 0.5]), two=_posgen([0.9, 0.2]))
  (axes,) = figures.by_position(results, original_contexts=[64]).axes
  values = [c.lines[0].get_ydata().tolist() for c in axes.containers]
  assert values == [[1.0, 0.5], [0.9, 0.2]]
  assert axes.containers[0].lines[0].get_xdata().tolist() == [4.5, 5.5]
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert sorted(labels) == ["one", "original window", "two"]
  by_length = dict(run={"128": dict(metric="ppl", ppl=9.0, by_position=[
    dict(start=0, end=64, ppl=8.0), dict(start=64, end=128, ppl=10.0)])})  # fmt: skip
  assert len(figures.by_length(by_length).axes) == 2
  (axes,) = figures.by_position(by_length).axes
  assert "128 tokens" in axes.get_title()


def test_results_without_positions_are_refused():
  with pytest.raises(ValueError, match="no values by position"):
    figures.by_position(dict(run={"128": dict(metric="ppl", ppl=9.0)}))


def test_files_are_written_where_a_path_is_given(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  plots.feature_gaps(ROPES, length=256)
  assert list(tmp_path.iterdir()) == []
  plots.feature_gaps(ROPES, "gaps.png", length=256)
  assert (tmp_path / "gaps.png").stat().st_size > 5000


def test_pyplot_is_left_to_the_user():
  """A notebook shows its own figures through pyplot, by the backend that it has chosen."""
  code = (
    "import rope_jax.plots, rope_jax.figures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
