# Sourced by the calls: folders on the host, and the functions that fill them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
host=${HOST_FOLDER:-/tmp/dali-diffusemix}
out=${OUT:-$host/out}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
export DALI_DIFFUSEMIX_SHARED=$host/shared DALI_DIFFUSEMIX_CACHE=$host/cache CUPY_CACHE_DIR=$host/cupy
ulimit -c 0 # a crash must not take the time to write gigabytes
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Keep the carried files in a folder outside the repository, where the next call finds them.
keep() {
    [ -d "$1" ] || { echo "there is no folder $1: carry it"; exit 1; }
    mkdir -p "$host/parts" "$host/shared"
    find "$1" -maxdepth 1 -type f -exec cp {} "$host/parts/" \;
    [ ! -d "$1/photographs" ] || cp -r "$1/photographs/." "$host/shared/"
}

# Build the library for the CPU; further arguments go to the compiler.
build_library() {
    "${CXX:-g++}" -std=c++17 -O3 -g0 -fno-math-errno -ffp-contract=off -fvisibility=hidden -fPIC -shared -pthread \
        kernels/*.cpp -o "$1" "${@:2}"
}

# Install the carried library; build it here if this system cannot load it. Without it, NumPy is slower.
place_library() {
    local target=kernels/libdali_diffusemix.so
    [ -e dali_diffusemix/kernels ] || ln -s ../kernels dali_diffusemix/kernels
    cp "$host/parts/libdali_diffusemix.so" $target 2> /dev/null
    "$python" -c "import ctypes; ctypes.CDLL('$PWD/$target')" && return
    echo "the carried library does not load: building it here"
    build_library $target || { rm -f $target; echo "no library for the CPU: NumPy does the work"; }
}

# Run the suite within $1 seconds.
suite() {
    mkdir -p "$host/results" "$out"
    COMMIT=$(cat "$host/parts/COMMIT" 2> /dev/null || echo unknown)
    export COMMIT
    exec "$python" benchmarks/gpu/suite.py --out "$host/results" --archive "$out/suite.tar.gz" --device "$device" \
        --photographs "$host/shared/imagenet_sample" --deadline "$1" ${SCALE:+--scale "$SCALE"} "${@:2}"
}
