"""The report in a real browser: it fits a phone and a desktop, and shows its figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_folders import write_run
from test_reports import digits

from rnode_plugin.experiments.reports import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
]

# A window cannot be as narrow as a phone, a frame can; what it measures is left as text in the page around it.
FRAME = """<!DOCTYPE html><html><body style="margin:0">
<iframe src="{report}" style="border:0;width:{width}px;height:1000px"></iframe><pre id="found"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const sizes = (what) => [...page.querySelectorAll(what)].map((each) => {{
    const box = each.getBoundingClientRect(); return [box.left, box.right, box.width, box.height]; }});
  document.querySelector("#found").textContent = JSON.stringify({{
    scroll: page.documentElement.scrollWidth, figures: sizes("figure"), svgs: sizes("img[src*=svg]"),
    images: [...page.images].map((each) => [each.complete, each.naturalWidth]), title: page.title,
  }});
}};
</script></body></html>"""


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_the_report_in_a_browser(tmp_path: Path, width: int) -> None:
    configurations = {"none": (), "kinetic": ("kinetic",), "rnode": ("kinetic", "jacfrob")}
    runs = [
        write_run(tmp_path / name, digits(penalties=penalties), bits=2 + 0.1 * number, jacfrob=4.0 - number)
        for number, (name, penalties) in enumerate(configurations.items())
    ]
    written, frame = write_report(runs, tmp_path / "out"), tmp_path / "frame.html"
    report, panels = written.html, len(written.figures) - len(runs)  # with a picture of samples for each run
    frame.write_text(FRAME.format(report=report.as_uri(), width=width))
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]
    shown = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=800)
    text = re.search(r'<pre id="found">(.+?)</pre>', shown.stdout, re.DOTALL)
    assert text is not None, shown.stderr
    found = json.loads(text[1])
    assert found["title"] == "3 configurations on digits"
    assert found["scroll"] == width  # nothing makes the page wider than the screen
    assert len(found["figures"]) == len(written.figures)
    for left, right, _, _ in found["figures"]:
        assert 0 <= left < right <= width
    assert len(found["svgs"]) == panels
    for _, _, shown_width, shown_height in found["svgs"]:
        assert shown_width >= 280
        assert shown_height == pytest.approx(shown_width * 3.5 / 4.8, rel=0.02)
    assert all(complete and natural >= 90 for complete, natural in found["images"])
