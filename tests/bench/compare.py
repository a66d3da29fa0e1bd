"""The ways to agree on `shakespeare-char`, side by side at equal tokens on slow links: `hvdtrain compare` (an hour).

make bench BENCH=compare        (BANDWIDTH=100mbit RANKS=4 STEPS=2000 SYNCS=...; KEEP=folder goes on where it stopped)
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import table
from running import PYTHON, run

SOURCE = Path(os.environ.get("SHAKESPEARE", Path(__file__).parents[3] / "shared/data/tinyshakespeare.txt"))


def prepare(folder: Path) -> Path:
    """The recipe's shards; made once."""
    data, tokenizer = folder / "data", folder / "tokenizer.json"
    if not (data / "manifest.json").exists():
        source = ["--input", str(SOURCE)]
        run([*PYTHON, "data_prep", "tokenizer", *source, "--kind", "char", "--out", str(tokenizer)])
        split = ["--val-split", "tail", "--val-fraction", "0.1"]
        run([*PYTHON, "data_prep", "text", *source, "--tokenizer", str(tokenizer), *split, "--out", str(data)])
    return data


def main() -> None:
    if not SOURCE.exists():
        sys.exit(f"needs tinyshakespeare.txt; set SHAKESPEARE=path (not at {SOURCE})")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("KEEP", name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        words = ["--ranks", os.environ.get("RANKS", "4"), "--bandwidth", os.environ.get("BANDWIDTH", "100mbit")]
        words += ["--syncs", os.environ["SYNCS"]] if "SYNCS" in os.environ else []
        settings = ["data.dir=data", f"train.steps={os.environ.get('STEPS', '2000')}"]
        command = [*PYTHON, "hvdtrain", "compare", "shakespeare-char", *words, "--out", "ways", *settings]
        code = subprocess.call(command, cwd=folder)  # from there, so that no path of this machine is in the table
        if code:
            sys.exit(code)
        for ending in ("md", "png"):
            shutil.copy(folder / "ways" / f"compare.{ending}", table.RESULTS / f"compare.{ending}")


if __name__ == "__main__":
    main()
