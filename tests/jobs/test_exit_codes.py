"""Exit codes stand in hvdtrain/errors.py alone; the batch scripts ask the package for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from hvdtrain import errors

ROOT = Path(__file__).resolve().parents[2]
CODES = {name: code for name, code in vars(errors).items() if name.startswith("EXIT_")}


def test_the_shell_has_those_of_the_package():
    script = ". slurm/job.sh && read_exit_codes && set | grep '^EXIT_' && echo $FINAL_EXITS"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    *lines, final = done.stdout.splitlines()
    assert dict(line.split("=") for line in lines) == {name: str(code) for name, code in CODES.items()}
    assert len(CODES) == 9
    assert final.split() == [str(code) for code in errors.FINAL_EXITS]
    assert {errors.EXIT_OK, errors.EXIT_CRASH, errors.EXIT_STOPPED_EARLY}.isdisjoint(errors.FINAL_EXITS)


def test_no_script_writes_one_itself():
    """But 2, before the environment is entered, and 124 and 137, which are those of timeout."""
    scripts = [*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sh")]
    code = "\n".join(re.sub(r"(?m)(^|\s)#.*", "", script.read_text()) for script in scripts)
    assert {int(number) for number in re.findall(r"\bexit (\d+)", code)} == {errors.EXIT_USAGE}
    assert re.findall(r"(?m)^ *(\d[\d |]*)\)", code) == ["124 | 137"]
    others = {number for number in CODES.values() if number > errors.EXIT_USAGE}
    assert others & {int(number) for number in re.findall(r"\b\d+\b", code)} == set()


def test_it_is_asked_at_every_start_and_loads_nothing_heavy():
    heavy = "{'torch', 'horovod', 'h5py', 'numpy', 'pydantic'}"
    code = f"import sys, hvdtrain.jobs.exit_codes; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
