#!/usr/bin/env bash
# Prepare the files that a GPU host without a network lacks, in two folders to carry, one per call.
#
#     benchmarks/gpu/prepare.sh FOLDER PHOTOGRAPHS BUNDLE [bundle.py]
#
# BUNDLE is the output of `bundle.py make --only-arch 90`: two parts. FOLDER/1 and FOLDER/2 get one part each, and as
# many photographs as fit into MOST bytes; FOLDER/1 also gets the library for the CPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "${1:?usage: prepare.sh FOLDER PHOTOGRAPHS BUNDLE [bundle.py]}" && cd "$1" && pwd)
photographs=$(cd "$2" && pwd) bundle=$(cd "$3" && pwd)
unpacker=$(realpath "${4:-$here/../../../shared/gpu_host/bundle.py}")
most=${MOST:-58000000} # bytes: 55.3 MiB; the repository comes on top
cd "$here/../.."
parts=("$bundle"/part-*)
[ ${#parts[@]} -eq 2 ] || { echo "$bundle holds ${#parts[@]} parts, two are needed: bundle.py make --only-arch 90"; exit 1; }
rm -rf "$folder/1" "$folder/2"
mkdir -p "$folder/1" "$folder/2"
cp "${parts[0]}" "$bundle/bundle.json" "$unpacker" "$folder/1/"
cp "${parts[1]}" "$folder/2/"
git rev-parse HEAD > "$folder/1/COMMIT"
(. benchmarks/gpu/common.sh > /dev/null && build_library "$folder/1/libdali_diffusemix.so" -static-libstdc++ -static-libgcc)
count=0
for number in 1 2; do
    size=$(du -sb "$folder/$number" | cut -f1)
    while read -r file; do
        target=$(find "$folder" -path "*/imagenet_sample/$file" -print -quit)
        [ -z "$target" ] || continue
        bytes=$(($(stat -c %s "$photographs/$file") + 1024))
        [ $((size + bytes)) -le "$most" ] || continue
        mkdir -p "$folder/$number/photographs/imagenet_sample/$(dirname "$file")"
        cp "$photographs/$file" "$folder/$number/photographs/imagenet_sample/$file"
        size=$((size + bytes)) count=$((count + 1))
    done < <(cd "$photographs" && find . -type f -printf '%P\n' | sort)
done
chmod -R u+w "$folder"
for number in 1 2; do
    size=$(du -sb "$folder/$number" | cut -f1)
    echo "$folder/$number: $((size >> 10)) KiB"
    [ "$size" -le $((56 << 20)) ] || { echo "more than 56 MiB"; exit 1; }
done
echo "$count photographs"
