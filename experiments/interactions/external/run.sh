#!/bin/sh
# Makes an environment per tool, then writes modelopt.json, mct.json and plans.csv.
#
#     sh experiments/interactions/external/run.sh [modelopt] [mct]      # default: both
#
# PYTHON is the interpreter (3.11), ENVIRONMENTS the folder of the environments.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
environments=${ENVIRONMENTS:-$here/../../../build/external}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export PYTHONPATH="$here/../../.."  # bitplan itself, without its dependencies
[ $# -gt 0 ] || set -- modelopt mct
for tool in "$@"; do
    environment=$environments/$tool
    "${PYTHON:-python3.11}" -m venv "$environment"
    "$environment/bin/pip" install --quiet --requirement "$here/requirements-$tool.txt"
    "$environment/bin/python" -W ignore "$here/plan_$tool.py"
done
