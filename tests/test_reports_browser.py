"""The report in a real browser: it fits a phone, is readable in light and dark, and shows its figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_folders import write_run
from test_reports import digits

from rnode_plugin.reports import write_report

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
FRAME = """<!DOCTYPE html><html style="color-scheme: light dark"><body style="margin:0">
<iframe src="{report}" style="border:0;width:{width}px;height:{height}px"></iframe><pre id="found"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
  const sizes = (what) => [...page.querySelectorAll(what)].map((each) => {{
    const box = each.getBoundingClientRect(); return [box.left, box.right, box.width, box.height]; }});
  const brightness = (what, property) => view.getComputedStyle(page.querySelector(what))[property];
  document.querySelector("#found").textContent = JSON.stringify({{
    scroll: page.documentElement.scrollWidth, figures: sizes("figure"), svgs: sizes("img[src*=svg]"),
    images: [...page.images].map((each) => [each.complete, each.naturalWidth]),
    paper: brightness("body", "backgroundColor"), ink: brightness("body", "color"),
    size: brightness("body", "fontSize"),
    open: page.querySelectorAll("details").length, title: page.title,
  }});
}};
</script></body></html>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    configurations = {"none": (), "kinetic": ("kinetic",), "jacfrob": ("jacfrob",), "rnode": ("kinetic", "jacfrob")}
    runs = [
        write_run(folder / name, digits(penalties=penalties), bits=2 + 0.1 * number, jacfrob=4.0 - number)
        for number, (name, penalties) in enumerate(configurations.items())
    ]
    return write_report(runs, folder / "out").html


def browse(folder: Path, report: Path, *, width: int, dark: bool) -> tuple[dict[str, Any], Image.Image]:
    """What the page measures, and how it looks."""
    height = 1000
    frame, picture = folder / "frame.html", folder / "page.png"
    frame.write_text(FRAME.format(report=report.as_uri(), width=width, height=height))
    command = [
        str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]  # fmt: skip
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    shown = subprocess.run([*command, "--dump-dom", frame.as_uri()], **options)
    found = re.search(r'<pre id="found">(.+?)</pre>', shown.stdout, re.DOTALL)
    assert found is not None, shown.stderr
    subprocess.run([*command, f"--screenshot={picture}", frame.as_uri()], check=True, **options)
    with Image.open(picture) as image:
        return json.loads(found[1]), image.convert("RGB").crop((0, 0, width, height))


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)], ids=["phone, dark", "desktop, light"])
def test_the_report_in_a_browser(report: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found, picture = browse(tmp_path, report, width=width, dark=dark)
    assert found["title"] == "4 configurations on digits"
    assert found["scroll"] == width  # nothing makes the page wider than the screen
    assert len(found["figures"]) == 11
    for left, right, _, _ in found["figures"]:
        assert left >= 0
        assert right <= width
    assert len(found["svgs"]) == 7
    for _, _, shown_width, shown_height in found["svgs"]:
        assert shown_width >= 280
        assert shown_height == pytest.approx(shown_width * 3.5 / 4.8, rel=0.02)
    assert len(found["images"]) == 11
    assert all(complete and natural >= 90 for complete, natural in found["images"])
    assert found["open"] == 5
    assert (luminance(found["paper"]) < 0.05) is dark
    assert contrast(found["paper"], found["ink"]) > 10
    corner = picture.getpixel((2, 2))
    assert isinstance(corner, tuple)
    assert (sum(corner) < 3 * 60) is dark
    assert np.asarray(picture).std() > 10  # something is drawn
