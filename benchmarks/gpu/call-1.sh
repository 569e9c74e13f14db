#!/usr/bin/env bash
# The first call on a GPU host: keep the carried files, and take the steps that need no DALI (step a).
#
#     OUT=FOLDER benchmarks/gpu/call-1.sh CARRIED/1 [OPTION...]    options are those of suite.py
. "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || { echo "usage: call-1.sh CARRIED/1 [OPTION...]"; exit 1; }
keep "$1"
place_library
suite 240 a "${@:2}"
