#!/usr/bin/env bash
# DiffuseMix, plain DALI and Pillow compared with plain FFCV, which needs its own environment (see bench_ffcv.py).
#
#     benchmarks/compare_ffcv.sh OUT [IMAGES]               unchanged originals
#     MAX_SIDE=400 benchmarks/compare_ffcv.sh OUT [IMAGES]  packed to 400 px, quality 90, for all of them
#
# Method: whole processes alternate, bench_loader.py, bench_ffcv.py, bench_loader.py, ..., ROUNDS times each, so that a
# drifting speed of the machine affects both alike. Each process runs one uncounted and one counted epoch of each of its
# contenders; preparation is never counted. An uncounted turn before fills the cache (links, edits, fractals, FFCV's
# files). The record, OUT/compare_ffcv-*.json, has the median of each contender and the ratio of diffusemix to it, and
# for FFCV's channels-last layouts also that of diffusemix_channels_last, which has the same memory layout.
#
# PYTHON and FFCV_PYTHON are the two interpreters; CACHE is a folder for prepared files (by default a temporary one);
# THREADS, BATCH, REPEAT, AHEAD (FFCV's batches_ahead), ONLY, WRITE and LAYOUT go to the two scripts.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: compare_ffcv.sh OUT [IMAGES]}
images=${2:-../shared/data/imagenet_sample}
python=${PYTHON:-python3}
ffcv=${FFCV_PYTHON:?the python of the environment with FFCV, see benchmarks/bench_ffcv.py}
rounds=${ROUNDS:-5}
mkdir -p "$out"
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cache=${CACHE:-$scratch/cache}
shared=("$images" --cache "$cache" --rounds 1 --threads "${THREADS:-2}" --batch-size "${BATCH:-64}")
shared+=(--repeat "${REPEAT:-8}")
[ -z "${MAX_SIDE:-}" ] || shared+=(--max-side "$MAX_SIDE")

for turn in $(seq 0 "$rounds"); do
    echo "== turn $turn of $rounds"
    for side in loader ffcv; do
        if [ $side = loader ]; then
            command=("$python" benchmarks/bench_loader.py --device cpu
                --only "${ONLY:-diffusemix,diffusemix_channels_last,plain_dali,pillow_mixed}")
        else
            command=("$ffcv" benchmarks/bench_ffcv.py --batches-ahead "${AHEAD:-1}" --write "${WRITE:-kept,encoded}"
                --layout "${LAYOUT:-nchw,contiguous,channels_last}")
        fi
        "${command[@]}" "${shared[@]}" --out "$scratch/$side-$turn.json" > "$scratch/log" 2>&1 || {
            tail -n 25 "$scratch/log"
            exit 1
        }
    done
done

"$python" - "$scratch" "$rounds" "$out/compare_ffcv-${MAX_SIDE:-whole}.json" << 'END'
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, "benchmarks")
from record import write

scratch, rounds, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
rates, cpu, memory, settings, machines = {}, {}, {}, {}, {}
for side in ("loader", "ffcv"):
    for turn in range(1, rounds + 1):
        record = json.loads((scratch / f"{side}-{turn}.json").read_text())
        settings[side], machines[side] = record["settings"], record["machine"]
        for name, found in record["results"].items():
            rates.setdefault(name, []).append(found["images_per_second"])
            cpu.setdefault(name, []).append(found["cpu_seconds_per_image"])
            if found["peak_memory_mib"] is not None:
                memory.setdefault(name, []).append(found["peak_memory_mib"])
            if "steady_images_per_second" in found:
                rates.setdefault(f"{name}_steady", []).append(found["steady_images_per_second"])
middle = {name: statistics.median(values) for name, values in rates.items()}
ours = ("diffusemix", "diffusemix_channels_last")


def ratios(name):
    alike = ours if name.startswith("ffcv") and "channels_last" in name else ours[:1]
    return {f"{one}_over_this": round(middle[one] / middle[name], 3) for one in alike if one in middle}


results = {
    name: {
        "images_per_second": round(middle[name], 1),
        "lowest": min(values),
        "highest": max(values),
        **({"cpu_seconds_per_image": round(statistics.median(cpu[name]), 6)} if name in cpu else {}),
        **({"peak_memory_mib": max(memory[name])} if name in memory else {}),
        "rounds": values,
        **ratios(name),
    }
    for name, values in rates.items()
}
write(out, {"benchmark": "compare_ffcv", "settings": settings, "machines": machines, "results": results})
END
