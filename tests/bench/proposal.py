"""The page of README's "Does it scale?": `hvdtrain scaling demo` on the two-node Slurm of the tests, in a browser.

    make bench BENCH=proposal       (three minutes; needs root, .ci/install-slurm and .ci/install-chromium)

Writes docs/scaling.png. A node of that Slurm has one core of this machine, or half of them.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from cluster import SlurmCluster  # noqa: E402
from launch import DATA_PREP, HVDTRAIN, environment  # noqa: E402

SIZE = (1000, 1960)  # CSS pixels: all of the page, and a border
LONG_S = 900


def prepare(folder: Path) -> None:
    """data/demo in ``folder``, as `make demo` makes it."""
    corpus = ["--input", sysconfig.get_path("stdlib"), "--glob", "*.py"]
    corpus += ["--exclude", "test", "tests", "site-packages", "dist-packages"]
    tokenizer = folder / "data" / "demo-tokenizer.json"
    made = ["--tokenizer", tokenizer, "--val-fraction", "0.05", "--out", folder / "data" / "demo"]
    for words in (["tokenizer", *corpus, "--vocab-size", "4096", "--out", tokenizer], ["text", *corpus, *made]):
        subprocess.run([*DATA_PREP, *map(str, words)], cwd=ROOT, check=True)


def photograph(page: Path, picture: Path, folder: Path) -> None:
    """folder: for the browser."""
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    words += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}", page.absolute().as_uri()]
    subprocess.run([shutil.which("chromium") or "chromium", *words], capture_output=True, check=True, timeout=60)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="proposal-") as name:
        folder = Path(name)
        prepare(folder)
        words = [*HVDTRAIN, "scaling", "demo", "--nodes", "1,2", "--kind", "strong", "--time", "20", "--wait"]
        (folder / "slurm").mkdir()
        with SlurmCluster(folder / "slurm") as slurm:
            done = slurm.run([str(word) for word in words], timeout_s=LONG_S, cwd=folder, env=environment())
        print(done.stdout, done.stderr, sep="")
        done.check_returncode()
        page = folder / "runs" / "scaling-demo-strong"
        print((page / "scaling.md").read_text(encoding="utf-8"))
        photograph(page / "scaling.html", ROOT / "docs" / "scaling.png", folder)


if __name__ == "__main__":
    main()
