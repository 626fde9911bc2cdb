"""The trainer: a script read top to bottom (`loop`), and the parts it calls."""
