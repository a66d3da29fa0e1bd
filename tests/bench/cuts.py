"""All that is measured of cuts and of sharded state, in one file: tensor.py, pipeline.py, zero.py, axis.py in turn."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from table import RESULTS

PARTS = ("tensor", "pipeline", "zero", "axis")


def main() -> None:
    texts = ["# Cutting a model over ranks\n\n`make bench BENCH=cuts`; each part can be measured alone."]
    with tempfile.TemporaryDirectory() as name:
        for part in PARTS:
            script = Path(__file__).with_name(f"{part}.py")
            subprocess.run([sys.executable, str(script)], env={**os.environ, "RESULTS": name}, check=True)
            texts.append("#" + Path(name, f"{part}.md").read_text(encoding="utf-8").rstrip())
    (RESULTS / "cuts.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
