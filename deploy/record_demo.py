"""Writes docs/run.svg: a terminal in which `./run` runs, with each line appearing in its turn. Run it as

    python3 deploy/record_demo.py

The demo only appends lines, so a line needs no more than the moment at which it appears. A viewer that does not animate
shows all of them.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from fcntl import ioctl
from html import escape
from pathlib import Path
from termios import TIOCSWINSZ

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 7.25, 17  # pixels of a character
LONGEST, SHORTEST = 1.5, 0.15  # seconds between two lines: nobody wants to wait, and everybody wants to read
STYLES = {"1": "b", "2": "d", "31": "r", "32": "g"}  # of SGR (ECMA-48, 8.3.117)
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" xml:space="preserve">
<title>A terminal in which ./run shows the whole path</title>
<style>
text {{ font: 12px ui-monospace, Menlo, 'DejaVu Sans Mono', monospace; fill: #d1d7e0; white-space: pre; }}
.b {{ font-weight: bold; fill: #ffffff; }}
.d {{ fill: #9198a1; }}
.g {{ fill: #3fb950; }}
.r {{ fill: #f85149; }}
@keyframes wait {{ from, to {{ visibility: hidden; }} }}
text {{ animation: wait 1ms; }}
@media (prefers-reduced-motion: reduce) {{ text {{ animation: none !important; }} }}
</style>
<rect width="100%" height="100%" rx="8" fill="#151b23"/>
"""  # noqa: E501


def record(*command: str) -> Iterator[tuple[float, str]]:
    """Run it on a terminal: its lines, and when each came, in seconds. Raises SystemExit if it fails."""
    terminal, end = os.openpty()
    ioctl(end, TIOCSWINSZ, struct.pack("4H", 50, 140, 0, 0))
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
    os.close(end)
    began, rest = time.monotonic(), b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # EIO: it has ended
            break
        *lines, rest = (rest + chunk).split(b"\r\n")
        for line in lines:
            yield time.monotonic() - began, line.decode()
    os.close(terminal)
    if status := process.wait():
        sys.exit(f"{' '.join(command)}: exit status {status}")


def drawn(line: str) -> str:
    """A line as SVG, with its styles."""
    styles: list[str] = []
    spans = []
    for codes, text in re.findall(r"(?:\x1b\[([\d;]*)m)?([^\x1b]*)", line):
        for code in codes.split(";") if codes else ():
            styles = [*styles, STYLES[code]] if code in STYLES else []
        if text:
            spans.append(f'<tspan class="{" ".join(styles)}">{escape(text)}</tspan>' if styles else escape(text))
    return "".join(spans)


def svg(lines: list[tuple[float, str]]) -> str:
    """The whole picture."""
    texts, at, before = [], 0.0, 0.0
    for number, (came, line) in enumerate(lines):
        at += min(max(came - before, SHORTEST), LONGEST) if number else 0
        before = came
        if line:
            y = 24 + number * HEIGHT
            texts.append(f'<text x="14" y="{y}" style="animation-duration: {at:.2f}s">{drawn(line)}</text>\n')
    columns = max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for _, line in lines)
    width, height = round(columns * WIDTH) + 28, len(lines) * HEIGHT + 24
    return HEAD.format(width=width, height=height) + "".join(texts) + "</svg>\n"


if __name__ == "__main__":
    shown = [(0.0, "$ \x1b[1m./run\x1b[0m"), *record(str(ROOT / "run"))]
    (ROOT / "docs/run.svg").write_text(svg(shown), encoding="utf-8")
