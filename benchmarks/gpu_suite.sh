#!/usr/bin/env bash
# Everything that wants a GPU, in one command: tests/gpu, the kernel alone, the loader against its rivals.
#
#     benchmarks/gpu_suite.sh OUT [IMAGES]       on a GPU host; OUT gets logs and JSON records
#     DEVICE=cpu benchmarks/gpu_suite.sh OUT ... the rehearsal, as far as it goes without one
#
# A step that fails is noted and the others still run; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: gpu_suite.sh OUT [IMAGES]}
images=${2:-../shared/data/imagenet_sample}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
threads=${THREADS:-$(nproc)}
rounds=${ROUNDS:-7}
mkdir -p "$out"
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
worst=0

step() {
    local name=$1
    shift
    echo "== $name"
    "$@" > "$out/$name.log" 2>&1
    local status=$?
    tail -n 25 "$out/$name.log"
    [ $status -eq 0 ] || { echo "== $name failed: $status"; worst=$status; }
}

# From a checkout, without installing: the kernels' folder is the package dali_diffusemix.kernels.
[ -e dali_diffusemix/kernels ] || "$python" -c 'import dali_diffusemix.kernels' 2> /dev/null || ln -s ../kernels dali_diffusemix/kernels
step versions "$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import json, record; print(json.dumps(record.machine(), indent=1))'
[ "$device" = cpu ] || step nvidia-smi nvidia-smi
step build "$python" setup.py -q build_ext --inplace
step tests "$python" -m pytest -q -rs -p no:cacheprovider -W default tests/gpu
repeat=100; [ "$device" = cpu ] && repeat=3
step kernel "$python" benchmarks/bench_kernel.py --device "$device" --repeat "$repeat" --threads "$threads" --out "$out/kernel.json"
for batch in ${BATCHES:-64 256}; do
    step "loader-$batch" "$python" benchmarks/bench_loader.py "$images" --device "$device" --batch-size "$batch" \
        --threads "$threads" --rounds "$rounds" --out "$out/loader-$batch.json"
done
# What mixing adds to a training step, target 1 %. CutMix and MixUp are kornia's.
sources=plain,diffusemix,all_mixed,plain_dali
"$python" -c 'import kornia' 2> /dev/null && sources=plain,diffusemix,all_mixed,cutmix,mixup,plain_dali
sizes=224; [ "$device" = cpu ] && sizes=64
step overhead "$python" benchmarks/bench_overhead.py "$images" --device "$device" --sizes "$sizes" --sources "$sources" \
    --workers "$threads" --rounds "$rounds" --out "$out/overhead.json"
# Generation, targets: 6x the released way at its 100 steps, 30x with few. Needs diffusers and transformers.
if "$python" -c 'import diffusers, transformers' 2> /dev/null; then
    size=--full-size; [ "$device" = cpu ] && size=
    step generate "$python" benchmarks/bench_generate.py $size --rounds "${GENERATE_ROUNDS:-5}" --out "$out/generate.json"
else
    echo "== generate: left out, diffusers or transformers is not installed"
fi
exit $worst
