#!/usr/bin/env bash
# benchmarks/gpu.sh [RESULTS]: runs this project's tests and benchmarks on a GPU. It takes at most about twenty minutes,
# the benchmarks ten of them.
#
#   tests       the exactness tests with the marker gpu    bench        headinfer bench on the whole GPU
#   sanitizer   compute-sanitizer, if it is installed      bench-24gb   the same, held to 24 GB like a consumer's card
#
# RESULTS: the folder of the results; benchmarks/results by default.
# STEPS="tests sanitizer": only these steps, for a machine that is available for a few minutes at a time.
# PYTHON: a Python with torch 2.11+ for CUDA, transformers 5.17+, and the small packages that are checked for below. The
# script works from a checkout that is not installed.
set -uo pipefail
python=${PYTHON:-python3}
steps=${STEPS:-tests sanitizer bench bench-24gb}
results=${1:+$(realpath -m -- "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
own=benchmarks/results # relative, since results contain the command
results=${results:-$own}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

stop() {
  echo "benchmarks/gpu.sh: $1" >&2
  exit 2
}

for step in $steps; do
  case "$step" in
    tests | sanitizer | bench | bench-24gb) ;;
    *) stop "STEPS names '$step': choose among tests, sanitizer, bench and bench-24gb" ;;
  esac
done
command -v "$python" > /dev/null || stop "there is no $python: name a Python with torch for CUDA in PYTHON"
"$python" - << 'PY' || exit 2
import importlib.util
import sys

needed = ("torch", "transformers", "packaging", "psutil", "rich", "typer", "xxhash", "pytest", "hypothesis")
missing = [name for name in needed if importlib.util.find_spec(name) is None]


def stop(sentence):
    sys.exit(f"benchmarks/gpu.sh: {sentence}")


if sys.version_info < (3, 11):
    stop(f"{sys.executable} is Python {sys.version.split()[0]}: name 3.11 or newer in PYTHON")
if missing:
    stop(f"{sys.executable} lacks {', '.join(missing)}: install them, or name another Python in PYTHON")

import torch
import transformers
from packaging.version import Version

for name, found, oldest in (("torch", torch.__version__, "2.11"), ("transformers", transformers.__version__, "5.17")):
    if Version(found) < Version(oldest):
        stop(f"{name} {found} is installed: {oldest} or newer is needed")
if not torch.cuda.is_available():
    stop(
        f"torch {torch.__version__} of {sys.executable} sees no CUDA device, and this script measures one: "
        "run it on a machine with an NVIDIA GPU, its driver and a CUDA build of torch"
    )
if torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is None:
    stop(f"{sys.executable} lacks accelerate, with which a test spreads a model over GPUs: install it, or make only one GPU visible")
PY
mkdir -p "$results" || stop "cannot write into $results: name another folder as the first argument"

mark="# benchmarks/gpu.sh" # the first line of each log, so that no other file is replaced
declare -A logs=([tests]="tests-gpu" [sanitizer]="racecheck memcheck sanitizer" [bench]="bench-gpu" [bench-24gb]="bench-gpu-24gb")
for step in $steps; do
  for name in ${logs[$step]}; do
    log=$results/$name.txt
    if [ -s "$log" ] && [ "$(head -c ${#mark} "$log" | tr -d '\0')" != "$mark" ]; then
      stop "$log is not a log of this script and is not replaced: move it away, or name another folder"
    fi
  done
done

failed=()
wanted() { [[ " $steps " == *" $1 "* ]]; }
step() { # step NAME SECONDS COMMAND...: shows and logs the output, and notes a failure for the end
  local name=$1 seconds=$2
  shift 2
  echo "== $name" >&2
  echo "$mark: $name" > "$results/$name.txt"
  timeout "$seconds" "$@" 2>&1 | tee -a "$results/$name.txt"
  local status=${PIPESTATUS[0]}
  if [ "$status" -eq 124 ]; then
    echo "$name was stopped after $seconds s" | tee -a "$results/$name.txt" >&2
  fi
  if [ "$status" -ne 0 ]; then failed+=("$name"); fi
}

if wanted tests; then
  mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
  step tests-gpu 600 "$python" -m pytest -W default -m gpu "${tests[@]}" # warnings of other versions are not failures
fi

if wanted sanitizer; then
  one='tests/engine/test_gpu.py::test_engine_against_float64[dims0-0.5-dtype0-0.0078125-cuda]'
  if command -v compute-sanitizer > /dev/null; then
    for tool in racecheck memcheck; do
      step "$tool" 300 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 3 \
        "$python" -m pytest -W default -m gpu "$one"
    done
  else
    echo "$mark: compute-sanitizer is not installed (it comes with the CUDA toolkit): its checks are left out" \
      | tee "$results/sanitizer.txt" >&2
  fi
fi

if wanted bench; then
  step bench-gpu 600 "$python" -m headinfer bench --device cuda --limit-s 340 --output "$results"
fi
if wanted bench-24gb; then
  step bench-gpu-24gb 450 "$python" -m headinfer bench decode prefill --device cuda --gpu-memory 24GB --limit-s 220 \
    --output "$results"
fi

if [ "$results" -ef "$own" ]; then # the document that compares these figures with the paper's
  new=$(mktemp) && "$python" benchmarks/paper/compare.py > "$new" && cat "$new" > docs/paper-comparison.md
  rm -f "$new"
fi

if [ "${#failed[@]}" -gt 0 ]; then
  echo "benchmarks/gpu.sh: these steps failed, see their output in $results: ${failed[*]}" >&2
  exit 1
fi
echo "benchmarks/gpu.sh: all done, results in $results" >&2
