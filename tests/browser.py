"""A real browser, by its command line: what the tests of pages look through."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
  "--enable-logging=stderr",
  "--virtual-time-budget=2000",
]


def find() -> str:
  """The browser; without one the test is skipped, but where CI is set it fails."""
  found = next(filter(None, map(shutil.which, NAMES)), None)
  if not found:
    why = f"no browser: install one of {', '.join(NAMES)} (apt-get install chromium)"
    pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
  return found


def run(page, profile, *flags: str, fragment: str = "") -> str:
  """Opens a page; returns what is printed. What its console says is an error."""
  done = subprocess.run(
    [find(), *FLAGS, f"--user-data-dir={profile}", *flags, f"{page.as_uri()}#{fragment}"],
    capture_output=True,
    text=True,
    timeout=60,
  )
  said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  assert done.returncode == 0 and not said, said or done.stderr
  return done.stdout


def dom(page, profile, fragment: str = "") -> "Dom":
  """The page after its scripts ran."""
  return Dom(run(page, profile, "--dump-dom", fragment=fragment))


class Dom(HTMLParser):
  """Elements in order, as dicts of their attributes with "tag" and "text" (of all inside)."""

  VOID = {"meta", "input", "br"}

  def __init__(self, html: str):
    super().__init__()
    self.html, self.elements, self._open = html, [], []
    self.feed(html)

  def all(self, tag: str, **attributes) -> list[dict]:
    """Elements of a tag with these attributes; `data_run` is for data-run."""
    wanted = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    return [
      e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in wanted.items())
    ]

  def rows(self) -> list[list[dict]]:
    """Cells of the rows of all tables that are shown."""
    return [
      [c for c in self.elements if c["tag"] in ("td", "th") and row in c["inside"]]
      for row in self.all("tr")
      if "off" not in row.get("class", "").split()
    ]

  def handle_starttag(self, tag, attrs):
    element = dict(attrs, tag=tag, text="", inside=list(self._open))
    self.elements.append(element)
    if tag not in self.VOID:
      self._open.append(element)

  def handle_startendtag(self, tag, attrs):
    self.elements.append(dict(attrs, tag=tag, text="", inside=list(self._open)))

  def handle_endtag(self, tag):
    while self._open and self._open.pop()["tag"] != tag:
      pass

  def handle_data(self, data):
    for element in self._open:
      element["text"] += data


def addresses(html: str) -> list[str]:
  """What a page would load or link to."""
  return re.findall(r"""\b(?:src|href)\s*=\s*[^\s>]+|\burl\([^)]*|@import[^;]*""", html)
