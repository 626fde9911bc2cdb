"""Several processes, each with its part of the devices: started from the environment.

Every process runs the same program on the same config. A workdir is one directory that all of them
see (a mount); process 0 writes in it, and checkpoints are written by all together.
"""

from __future__ import annotations

import os

import jax
import numpy as np

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
  """Joins the other processes, if there are any; to be called before anything else of jax.

  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who
  they are; without them jax asks what it runs on (Cloud TPU, Slurm, Open MPI, Kubernetes).

  Raises:
    ValueError: if some of the three variables are missing, or not numbers.
  """
  given = {name: os.environ[name] for name in _GIVEN if name in os.environ}
  if given:
    address, number, process = (given.get(name, "") for name in _GIVEN)
    if not (address and number.isdigit() and process.isdigit() and int(process) < int(number)):
      raise ValueError(
        f"config.mesh: {given}; set all of {', '.join(_GIVEN)}, e.g. localhost:1234, 2 and 0"
      )
    jax.distributed.initialize(address, int(number), int(process))
    return
  try:
    jax.distributed.initialize()
  except ValueError as error:
    if "coordinator_address" not in str(error):
      raise
    # Nothing that jax knows: one process.


def is_main() -> bool:
  """Whether this process writes files and talks."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Returns when all processes are here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def any_of(value: bool) -> bool:
  """Whether it is true in any process; all must ask."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.asarray(value)).any())


def of_main(value: int) -> int:
  """The number that the main process has; all must ask."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
