#!/usr/bin/env bash
# The second call on a GPU host: unpack DALI, then take steps b to g, within SECONDS.
#
#     OUT=FOLDER benchmarks/gpu/call-2.sh CARRIED/2 [SECONDS [STEP or OPTION...]]
#
# A later call without carried files: call-2.sh - SECONDS loader-tests. With --resume, steps that passed are skipped.
. "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || { echo "usage: call-2.sh CARRIED/2 [SECONDS [STEP or OPTION...]]"; exit 1; }
seconds=${2:-480}
[ "$1" = - ] || keep "$1"
place_library
if [ ! -e "$host/site/.unpacked" ]; then
    rm -rf "$host/site"
    "$python" "$host/parts/bundle.py" unpack --parts "$host/parts" --target "$host/site" && touch "$host/site/.unpacked" || {
        echo "DALI is not unpacked: carry CARRIED/1 (call-1.sh) and CARRIED/2 to this host, one after the other"
        mkdir -p "$host/results" "$out"
        tar czf "$out/suite.tar.gz" -C "$host" results
        exit 1
    }
    echo "unpacked after $SECONDS s"
fi
export PYTHONPATH=$host/site${PYTHONPATH:+:$PYTHONPATH}
steps=("${@:3}")
case ${steps[0]:--} in -*) steps=(b c d e f g "${steps[@]}") ;; esac
suite $((seconds - SECONDS)) "${steps[@]}"
