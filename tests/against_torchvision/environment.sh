#!/usr/bin/env bash
# Makes a virtual environment for compare.py: torchvision, timm and what this package needs.
#
#     environment.sh FOLDER [PYTHON]      FOLDER is the environment's; PYTHON is python3 by default
#
# torch comes from PyTorch's own index, for the CPU. This package is not installed: compare.py uses its
# checkout, whose kernel must be built.
set -euo pipefail
folder=${1:?the folder of the new environment}
python=${2:-python3}
test -x "$folder/bin/python" || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install -q --upgrade pip
"$folder/bin/python" -m pip install -q --index-url https://download.pytorch.org/whl/cpu torch==2.14.1 torchvision==0.29.1
"$folder/bin/python" -m pip install -q timm==1.0.31 "numpy>=2" pillow psutil hypothesis pytest jsonschema
