"""Runs killed by SIGKILL, as a user would meet it: the command line, again and again.

`python tests/faults kill_train --count=20 --seed=7` does the same for longer, at more moments.
"""

import kills
import pytest


@pytest.mark.long
def test_a_training_run_that_is_killed_ends_the_same():
  figures = kills.train(seed=0, count=4, kinds=("save", "steps", "removal", "final"))
  assert figures["kills"] == 4 and figures["inside_a_save"] and figures["in_an_evaluation"]


@pytest.mark.long
def test_an_evaluation_that_is_killed_ends_the_same():
  figures = kills.evaluation(seed=0, count=1, brief=True)
  assert figures["kills"] == figures["in_an_evaluation"] == 1
