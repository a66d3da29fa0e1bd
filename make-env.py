"""What make-env.sh has to ask of a Python: requirements, wheels, a site's packages, CUDA. Nothing but pip is needed.

    requirements [WITHOUT...]           what setup.cfg asks for, a line each
    check-wheels FOLDER REQUIREMENT...  is there a wheel for this Python and machine of each? Says what is not
    system                              where the interpreter that runs this has its packages; it must have torch
    frozen                              NAME==VERSION of all that is there
    missing REQUIREMENT...              those of which nothing is there
    check-system REQUIREMENT...         is what is there within the bounds? Says what is not
    cuda                                three lines: NCCL's folder, compute capabilities (empty: without), a note

An answer is printed; what is wrong is said on standard error, with the way out, and the exit code is 1.
"""

import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

# A virtual environment has its own of these, whatever the site has: they build, and nothing imports them later.
BUILD_TOOLS = {"pip", "setuptools", "wheel"}


def fail(*lines: str) -> NoReturn:
    print(*(f"make-env: {line}" for line in lines), sep="\n", file=sys.stderr)
    sys.exit(1)


def requirements(without: list[str]) -> list[str]:
    """What the package, its tests and `make lint` need, as setup.cfg has it, without these packages and extras."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).with_name("setup.cfg"), encoding="utf-8")
    extras = [lines for name, lines in setup["options.extras_require"].items() if name not in without]
    lines = "\n".join([setup["options"]["install_requires"], *extras])
    found = [line.replace(" ", "") for line in lines.splitlines() if line.strip()]
    return [line for line in found if re.split("[<>=!~]", line)[0] not in without]


def check_wheels(folder: Path, wanted: list[str]) -> None:
    """Every requirement must have a wheel here that fits; Horovod comes as source."""
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

    if not folder.is_dir():
        fail(f"WHEELS={folder} is no folder; make it where there is a network: make wheels WHEELS={folder}")
    wheels: dict[str, list] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(path.name)
        wheels.setdefault(name, []).append((version, tags))
    fitting, problems = set(sys_tags()), []
    for line in wanted:
        requirement = Requirement(line)
        there = wheels.get(canonicalize_name(requirement.name), [])
        usable = [version for version, tags in there if tags & fitting]
        if not there:
            problems.append(f"{line} is missing")
        elif not usable:
            kinds = sorted({str(tag) for _, tags in there for tag in tags})
            problems.append(f"{requirement.name} is there for another Python or platform ({', '.join(kinds)})")
        elif not any(requirement.specifier.contains(version, prereleases=True) for version in usable):
            versions = ", ".join(map(str, usable))
            problems.append(f"{requirement.name} {versions} is there, but {line} is needed")
    if problems:
        here = f"this is Python {sys.version_info[0]}.{sys.version_info[1]} on {sysconfig.get_platform()}"
        fail(f"WHEELS={folder} lacks something; {here}:", *(f"  {problem}" for problem in problems), AGAIN)


AGAIN = "make the folder for this Python and machine where there is a network: make wheels PYTHON=3.x PLATFORM=..."


def system() -> None:
    """The folders in the order in which they are searched."""
    if importlib.util.find_spec("torch") is None:
        fail(
            f"TORCH=system, but {sys.executable} has no torch",
            "load the site's PyTorch module first, or name its interpreter in PYTHON",
        )
    paths = sysconfig.get_paths()
    own = {os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib")}
    folders = [os.path.realpath(folder) for folder in sys.path[1:] if os.path.isdir(folder)]
    print(*(folder for folder in folders if folder not in own and not folder.endswith("/lib-dynload")), sep="\n")


def frozen() -> None:
    """What pip must leave as it is."""
    print(*(f"{name}=={version}" for name, version in sorted(_installed().items())), sep="\n")


def missing(wanted: list[str]) -> None:
    there = _installed()
    print(*(line for line in wanted if _canonical(re.split("[<>=!~]", line)[0]) not in there), sep="\n")


def _installed() -> dict[str, str]:
    """Canonical name -> version; of two the one that is found first, as an import would."""
    found: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        if dist.metadata and (name := dist.metadata["Name"]):
            found.setdefault(_canonical(name), dist.version)
    return {name: version for name, version in found.items() if name not in BUILD_TOOLS}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_system(wanted: list[str]) -> None:
    """Nothing that is there is replaced: it must fit as it is."""
    from pip._vendor.packaging.requirements import Requirement

    there, problems = _installed(), []
    for line in wanted:
        requirement = Requirement(line)
        version = there.get(_canonical(requirement.name))
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"  {requirement.name} {version} is there, but {requirement.specifier} is needed")
    if problems:
        fail("TORCH=system: the site's Python has packages outside the bounds of setup.cfg:", *problems, OTHERWISE)


OTHERWISE = "take another module of the site, or leave out TORCH=system for an environment of its own"


# --- CUDA ------------------------------------------------------------------------------------------------------------


def cuda() -> None:
    """Can Horovod be built with NCCL here, and for which GPUs? NCCL=1 in the environment: it must; 0: it shall not."""
    import torch

    wanted = os.environ.get("NCCL", "")
    if wanted not in ("", "0", "1"):
        fail(f"NCCL={wanted}: expected 1 (build with it or fail), 0 (without) or nothing (where it is possible)")
    gpus, ours = _gpus(), torch.version.cuda
    if wanted == "0":
        return _answer(note="NCCL=0: Horovod without NCCL")
    if ours is None:
        if wanted:
            fail(f"NCCL=1, but torch {torch.__version__} is a CPU build: name a CUDA build in TORCH, or TORCH=system")
        hint = f"; this machine has {_named(gpus)}: name a CUDA build in TORCH to use it" if gpus else ""
        return _answer(note=f"Horovod without NCCL: torch {torch.__version__} is a CPU build{hint}")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        said = f"torch {torch.__version__} is for CUDA {ours}, but nvcc is not on the PATH: load a CUDA {ours} module"
        if wanted:
            fail(f"NCCL=1: {said}")
        return _answer(note=f"Horovod WITHOUT NCCL, gradients would travel through host memory: {said} and run again")
    theirs = re.search(r"release (\d+)\.(\d+)", _said("nvcc", "--version"))
    if theirs is None or theirs[1] != ours.partition(".")[0]:
        release = f"CUDA {theirs[1]}.{theirs[2]}" if theirs else "of an unknown release"
        fail(
            f"nvcc ({nvcc}) is {release}, but torch {torch.__version__} is for CUDA {ours}: the majors differ",
            f"load a CUDA {ours} module, or choose another TORCH, or NCCL=0 for a Horovod without NCCL",
        )
    flags = torch._C._cuda_getArchFlags() or ""
    if gpus and not torch.cuda.is_available():
        fail(
            f"there is {_named(gpus)}, but torch {torch.__version__} for CUDA {ours} cannot use it: too old a driver",
            "choose a TORCH for the CUDA that `nvidia-smi` shows, or have the driver updated",
        )
    known = set(re.findall(r"sm_(\d+)", _said("nvcc", "--list-gpu-code")))
    for name, capability in gpus:
        _check_gpu(name, capability, flags, known)
    asked = os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST", "")
    chosen = asked.split(",") if asked else sorted({capability for _, capability in gpus}, key=int)
    where = f"for {_named(gpus)}" if gpus else "no GPU answers here (nvidia-smi): for those that this torch knows"
    where = f"for compute capabilities {asked}, as asked" if asked else where
    if not chosen:
        chosen = [number for number in re.findall(r"sm_(\d+)", flags) if number in known]
    home, version = _nccl(ours)
    return _answer(home, ",".join(chosen), f"Horovod with NCCL {version} of {home}; {where}")


def _answer(home: str = "", capabilities: str = "", note: str = "") -> None:
    print(home, capabilities, note, sep="\n")


def _gpus() -> list[tuple[str, str]]:
    """(name, compute capability without its point) of each GPU that the driver shows; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    rows = _said("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader").splitlines()
    found = [row.rpartition(",") for row in rows if re.search(r",\s*\d+\.\d+$", row)]
    return [(name.strip(), capability.strip().replace(".", "")) for name, _, capability in found]


def _named(gpus: list[tuple[str, str]]) -> str:
    names = sorted({f"{name} ({capability[:-1]}.{capability[-1]})" for name, capability in gpus})
    return f"{len(gpus)} x {', '.join(names)}"


def _check_gpu(name: str, capability: str, flags: str, known: set[str]) -> None:
    """Machine code runs on GPUs of its own generation that are as new; PTX (compute_) on all that are as new."""
    codes = re.findall(r"\b(sm|compute)_(\d+)", flags)
    runs = any(
        int(number) <= int(capability) and (kind == "compute" or number[:-1] == capability[:-1])
        for kind, number in codes
    )
    if not runs:
        built = ", ".join(f"{kind}_{number}" for kind, number in codes)
        fail(f"{name} has compute capability {capability}, this torch was built for {built}", "choose another TORCH")
    if capability not in known:
        fail(f"{name} has compute capability {capability}, which this nvcc does not know: load a newer CUDA module")


def _nccl(cuda_version: str) -> tuple[str, str]:
    """NCCL's folder (include/nccl.h, lib/libnccl.so*) and version: torch's own first, then what the site names."""
    places = [os.environ.get("HOROVOD_NCCL_HOME"), os.environ.get("NCCL_HOME")]
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
        places += list(spec.submodule_search_locations or []) if spec else []
    except ModuleNotFoundError:
        pass
    places += [os.environ.get("CUDA_HOME"), "/usr/local", "/usr"]
    for place in filter(None, places):
        header = Path(place, "include", "nccl.h")
        if header.exists() and nccl_library(place):
            parts = dict(re.findall(r"#define NCCL_(MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text(errors="replace")))
            return place, ".".join(parts.get(name, "?") for name in ("MAJOR", "MINOR", "PATCH"))
    fail(
        f"torch is for CUDA {cuda_version}, but no NCCL with its header was found (include/nccl.h, lib/libnccl.so)",
        "name its folder in NCCL_HOME, or NCCL=0 for a Horovod without NCCL",
    )


def nccl_library(home: str) -> str:
    """The shared library in ``home``, or nothing."""
    folders = ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}")
    found = [
        path for folder in folders for name in ("libnccl.so", "libnccl.so.2") for path in [Path(home, folder, name)]
    ]
    return next((str(path) for path in found if path.exists()), "")


def _said(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def main(words: list[str]) -> None:
    match words:
        case ["requirements", *without]:
            print(*requirements(without), sep="\n")
        case ["check-wheels", folder, *wanted]:
            check_wheels(Path(folder), wanted)
        case ["system"]:
            system()
        case ["frozen"]:
            frozen()
        case ["missing", *wanted]:
            missing(wanted)
        case ["check-system", *wanted]:
            check_system(wanted)
        case ["cuda"]:
            cuda()
        case ["nccl-library", home]:
            print(nccl_library(home))
        case _:
            fail(f"make-env.py does not know {' '.join(words)!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
