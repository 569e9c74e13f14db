#!/usr/bin/env bash
# Makes the virtual environment of compare.py: torchvision, timm and this package. With PyPI's torch it takes 7 GB; for
# the one without CUDA set PIP_INDEX_URL=https://download.pytorch.org/whl/cpu and PIP_EXTRA_INDEX_URL to PyPI.
#
#     environment.sh FOLDER [PYTHON]      FOLDER is the environment's; PYTHON is python3 by default
set -euo pipefail
folder=${1:?the folder of the new environment}
python=${2:-python3}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
test -x "$folder/bin/python" || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install -q --upgrade pip "setuptools>=80" wheel
"$folder/bin/python" -m pip install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 hypothesis
"$folder/bin/python" -m pip install -q -e "$checkout[cpu]" # builds the kernel; DALI is for bench_augment.py
