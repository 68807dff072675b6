"""The report in a real browser, at a desk, on a telephone, on paper: nothing runs, is fetched, or spills."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nermill.worker.evaluation import evaluate, write_report
from tests.unit.evaluation.runs import Doc, make_run, stats_of, write_part

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]
ATTACK = "<script>alert(1)</script>"
# A page that looks into the report at both widths and writes down what it sees.
LOOK = """<!doctype html><link rel="icon" href="data:,"><body><pre id="seen"></pre><script>
const widths = [1280, 390], seen = {};
function light(colour) {  // relative luminance
  const linear = share => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = colour.match(/[\\d.]+/g).map(c => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(text, ground) {
  const style = getComputedStyle(text), ink = text.closest("svg") ? style.fill : style.color;
  const [low, high] = [light(ink), light(getComputedStyle(ground).backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:3000px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, texts = [...page.querySelectorAll("svg text")];
    const spilling = [...page.querySelectorAll("body *")].filter(e =>
      !e.closest("svg") && !e.closest(".table") && e.getBoundingClientRect().right > width + 1);
    seen[width] = {
      scroll: page.documentElement.scrollWidth,
      spilling: spilling.length,
      dangerous: page.querySelectorAll("script, img, iframe, object").length,
      text: page.body.innerText.includes("<script>alert(1)</scr" + "ipt>"),
      smallest: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
      contrast: contrast(page.querySelector("header .soft"), page.body),
      chart_contrast: contrast(texts[0], page.body),
      dark: light(getComputedStyle(page.body).backgroundColor) < 0.2,
      charts: [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 100).length,
    };
    document.getElementById("seen").textContent = JSON.stringify(seen);
  };
  frame.src = `_report.html?${width}`;
  document.body.append(frame);
}
</script>"""


def browse(profile: Path, address: str, *options: str) -> tuple[str, str]:
    """What Chromium writes to standard output, and the messages of its console."""
    command = [BROWSER or "", *QUIET, f"--user-data-dir={profile}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a report over harmless, hostile and very long documents on two devices."""
    gold = ["B-PER", "O", "O", "B-LOC"]
    docs = [Doc(["Anna", "flew", "to", "Rome"], gold if n % 3 else ["O"] * 4, gold) for n in range(300)]
    docs += [
        Doc([ATTACK, "<img src=//example.org/x>"] * 20, ["B-PER", "O"] * 20, ["O", "B-LOC"] * 20, id=ATTACK),
        Doc(["x" * 100_000], ["B-PER"], ["O"]),
        Doc([f"word{n}" for n in range(15_000)], ["B-PER"] * 15_000, ["O"] * 15_000),
    ]
    run = make_run(tmp_path_factory.mktemp("report"), docs, per_shard=60)
    for shard in range(6):
        some = docs[60 * shard : 60 * shard + 60]
        write_part(run, shard, 60 * shard, some, stats_of(shard, len(some), device=f"npu:{shard % 2}"))
    write_report(run, evaluate(run, compare=run))
    path = Path(run.path(""))
    (path / "look.html").write_text(LOOK, "utf-8")
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server over the folder: its address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_at_a_desk_and_on_a_telephone(server: tuple[str, list[str]], tmp_path: Path, scheme: str) -> None:
    address, asked = server
    how = ["--dump-dom", "--virtual-time-budget=20000"]
    how += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    dom, console = browse(tmp_path / "profile", f"{address}/look.html", *how)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert set(seen) == {"1280", "390"}
    for width, view in seen.items():
        assert view["scroll"] <= int(width)
        assert view["spilling"] == 0
        assert view["dangerous"] == 0
        assert view["text"]
        assert view["charts"] == 10
        assert view["smallest"] >= 7
        assert view["dark"] == (scheme == "dark")
        assert view["contrast"] >= 4.5
        assert view["chart_contrast"] >= 7
    assert console == ""
    assert set(asked) == {"/look.html", "/_report.html?1280", "/_report.html?390"}


def test_alone_it_asks_for_nothing_and_complains_of_nothing(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    picture = tmp_path / "report.png"
    _, console = browse(
        tmp_path / "profile", f"{address}/_report.html", f"--screenshot={picture}", "--window-size=1280,2000"
    )
    assert console == ""
    assert asked == ["/_report.html"]
    assert picture.stat().st_size > 50_000


def test_on_paper(folder: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    _, console = browse(
        tmp_path / "profile", (folder / "_report.html").as_uri(), f"--print-to-pdf={paper}", "--no-pdf-header-footer"
    )
    assert console == ""
    data = paper.read_bytes()
    assert data.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", data)) >= 3
