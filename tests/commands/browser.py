"""Debian's chromium, without a screen: does a page load by itself, and does it ask anybody for anything?"""

import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from not_here import not_here

_LOCAL = ("file:", "data:", "chrome:", "chrome-extension:", "devtools:")
# The browser's own business, whatever page is open.
_BROWSERS = {
    "update.googleapis.com",
    "clients2.google.com",
    "accounts.google.com",
    "optimizationguide-pa.googleapis.com",
}


def open_page(page: Path, folder: Path) -> tuple[str, set[str]]:
    """The page as the browser has it after loading, and what it asked for elsewhere. folder: for the browser."""
    browser = shutil.which("chromium")
    if browser is None:
        not_here("no chromium (Debian: apt install chromium) to open the page in")
    log = folder / "net.json"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    words += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    words += [f"--log-net-log={log}", "--enable-logging=stderr", "--v=0", "--dump-dom", page.absolute().as_uri()]
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=60, check=True)
    refused = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not refused, refused
    events = json.loads(log.read_text())["events"]
    urls = {str(event.get("params", {}).get("url", "")) for event in events}
    return done.stdout, {
        url for url in urls if url and not url.startswith(_LOCAL) and urlsplit(url).hostname not in _BROWSERS
    }
