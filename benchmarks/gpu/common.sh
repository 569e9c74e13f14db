# Sourced by the calls: where things lie on the host, and how what was carried gets there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
host=${HOST_FOLDER:-/tmp/dali-diffusemix}
out=${OUT:-$host/out}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
export DALI_DIFFUSEMIX_SHARED=$host/shared DALI_DIFFUSEMIX_CACHE=$host/cache CUPY_CACHE_DIR=$host/cupy
ulimit -c 0 # a crash must not take the time to write gigabytes
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Keep what was carried in a folder outside the repository, where the next call finds it.
keep() {
    [ -d "$1" ] || { echo "there is no folder $1: carry it"; exit 1; }
    mkdir -p "$host/parts" "$host/shared"
    find "$1" -maxdepth 1 -type f -exec cp {} "$host/parts/" \;
    [ ! -d "$1/photographs" ] || cp -r "$1/photographs/." "$host/shared/"
}

# The library for the CPU; arguments are the compiler's.
build_library() {
    "${CXX:-g++}" -std=c++17 -O3 -g0 -fno-math-errno -ffp-contract=off -fvisibility=hidden -fPIC -shared -pthread \
        kernels/*.cpp -o "$1" "${@:2}"
}

# Put the carried library in its place; build it here if this system cannot load it. Without one NumPy is slower.
place_library() {
    local target=kernels/libdali_diffusemix.so
    [ -e dali_diffusemix/kernels ] || ln -s ../kernels dali_diffusemix/kernels
    cp "$host/parts/libdali_diffusemix.so" $target 2> /dev/null
    "$python" -c "import ctypes; ctypes.CDLL('$PWD/$target')" && return
    echo "the carried library does not load: building it here"
    build_library $target || { rm -f $target; echo "no library for the CPU: NumPy does the work"; }
}

# The suite; $1: seconds for it.
suite() {
    mkdir -p "$host/results" "$out"
    COMMIT=$(cat "$host/parts/COMMIT" 2> /dev/null || echo unknown)
    export COMMIT
    exec "$python" benchmarks/gpu/suite.py --out "$host/results" --archive "$out/suite.tar.gz" --device "$device" \
        --photographs "$host/shared/imagenet_sample" --deadline "$1" ${SCALE:+--scale "$SCALE"} "${@:2}"
}
