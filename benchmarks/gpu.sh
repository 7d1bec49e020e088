#!/usr/bin/env bash
# benchmarks/gpu.sh [1|2|3] [RESULTS]: runs this project's tests and benchmarks on a GPU, what matters most first. Each
# of the three parts takes at most five minutes, so that a GPU that is lent for minutes is enough. Without a number all
# of them run.
#
#   1  tests        the exactness tests with the marker gpu
#      decode       a token after 1K, 64K and 1M tokens, in turns with transformers' caches and the paper's scheme; from 64K
#                   on also with a share of the host's CPU
#   2  prefill      chunks after 64K and 1M tokens, and a whole prompt of 100K
#      24gb         decode after 4M, 256K, 16K and 4K tokens and a chunk after 256K, held to 24 GB like a consumer's card
#   3  generate     the first token of Llama-3-8B with random weights, which the GPU draws
#      demo         the demo at 100K tokens
#      real         a prompt of 256K tokens that is really read, for the shape of Qwen2-7B
#      kernels      the link and the attention kernels
#      embedded     what the embedded model finds in 512K and 1M tokens
#   -  sanitizer    compute-sanitizer, if it is installed: only if STEPS names it
#
# Each step has a limit of time, and results are written as they come, so a step that is stopped keeps what it measured.
# RESULTS: the folder of the results; benchmarks/results by default.
# STEPS="tests sanitizer": only these steps.
# PYTHON: a Python with torch 2.11+ for CUDA, transformers 5.17+, and the small packages that are checked for below. The
# script works from a checkout that is not installed. With pytest-xdist the tests run in six processes.
set -uo pipefail
python=${PYTHON:-python3}
declare -A parts=([1]="tests decode" [2]="prefill 24gb" [3]="generate demo real kernels embedded")
declare -A limits=(
  [tests]=170 [decode]=110
  [prefill]=140 [24gb]=140
  [generate]=25 [demo]=40 [real]=60 [kernels]=45 [embedded]=110
  [sanitizer]=600
) # seconds
part_seconds=290
part=
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  part=$1
  shift
fi
steps=${STEPS:-${part:+${parts[$part]:-}}}
steps=${steps:-${parts[1]} ${parts[2]} ${parts[3]}}
results=${1:+$(realpath -m -- "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
own=benchmarks/results # relative, since results contain the command
results=${results:-$own}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

stop() {
  echo "benchmarks/gpu.sh: $1" >&2
  exit 2
}

if [[ -n $part && -z ${parts[$part]:-} ]]; then stop "there is no part $part: choose 1, 2 or 3"; fi
for step in $steps; do
  if [[ -z ${limits[$step]:-} ]]; then
    stop "STEPS names '$step': choose among ${parts[1]} ${parts[2]} ${parts[3]} sanitizer"
  fi
done
command -v "$python" > /dev/null || stop "there is no $python: name a Python with torch for CUDA in PYTHON"
found=$("$python" - << 'PY'
import importlib.util
import re
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

print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
print(6 if importlib.util.find_spec("xdist") else 0)
PY
) || exit 2
{ read -r gpu && read -r processes; } <<< "$found"
mkdir -p "$results" || stop "cannot write into $results: name another folder as the last argument"

mark="# benchmarks/gpu.sh" # the first line of each log, so that no other file is replaced
for step in $steps; do
  log=$results/$step-gpu.txt
  if [ -s "$log" ] && [ "$(head -c ${#mark} "$log" | tr -d '\0')" != "$mark" ]; then
    stop "$log is not a log of this script and is not replaced: move it away, or name another folder"
  fi
done

failed=()
until=$((part ? SECONDS + part_seconds : 1000000)) # a part ends then, whatever its steps take
step() { # step NAME COMMAND...: shows and logs the output within the step's limit, and notes a failure for the end
  local name=$1 seconds=${limits[$1]}
  local left=$((until - SECONDS))
  shift
  if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
  if [ "$seconds" -lt 5 ]; then
    echo "$mark: $name: no time was left for it" | tee "$results/$name-gpu.txt" >&2
    failed+=("$name")
    return
  fi
  echo "== $name: at most $seconds s" >&2
  echo "$mark: $name" > "$results/$name-gpu.txt"
  timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$results/$name-gpu.txt"
  local status=${PIPESTATUS[0]}
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    echo "$name was stopped after $seconds s" | tee -a "$results/$name-gpu.txt" >&2
  fi
  if [ "$status" -ne 0 ]; then failed+=("$name"); fi
}
bench() { # bench NAME LIMIT ARGUMENTS...: a step of `headinfer bench` with its own result
  local name=$1 limit=$2
  shift 2
  step "$name" "$python" -m headinfer bench "$@" --device cuda --limit-s "$limit" --output "$results/$gpu-$name.json"
}

sanitize() {
  local one='tests/engine/test_gpu.py::test_engine_against_float64[dims0-0.5-dtype0-0.0078125-cuda]'
  local tool
  for tool in racecheck memcheck; do
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 3 \
      "$python" -m pytest -W default -m gpu "$one" || return
  done
}

for one in $steps; do
  case "$one" in
    tests)
      mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
      parallel=()
      if [ "$processes" -gt 0 ]; then parallel=(-n "$processes" --dist worksteal); fi
      # with -W default, since warnings of other versions are not failures
      step tests "$python" -m pytest -W default -m gpu "${parallel[@]}" "${tests[@]}"
      ;;
    decode) bench decode 85 decode --tokens 1K,64K,1M --baselines dynamic,paper,offloaded,resident,int8,int4 ;;
    prefill) bench prefill 115 prefill --offsets 64K,1M --whole 100K --baselines resident,layer-wise ;;
    24gb)
      bench 24gb 115 decode prefill --tokens 4M,256K,16K,4K --offsets 256K --baselines paper,layer-wise,free \
        --gpu-memory 24GB
      ;;
    generate)
      step generate "$python" -m headinfer generate random:llama-3-8b --device cuda --prompt Hello \
        --max-new-tokens 1 --json
      ;;
    demo) step demo "$python" -m headinfer demo --context 100000 --device cuda ;;
    real) bench real 45 real --whole 256K ;;
    kernels) bench kernels 30 link attention ;;
    embedded)
      step embedded "$python" training/evaluate.py --lengths 512K,1M --device cuda --out "$results/embedded.json"
      ;;
    sanitizer)
      if command -v compute-sanitizer > /dev/null; then
        export -f sanitize
        export python
        step sanitizer bash -c sanitize
      else
        echo "$mark: compute-sanitizer is not installed (it comes with the CUDA toolkit): its checks are left out" \
          | tee "$results/sanitizer-gpu.txt" >&2
      fi
      ;;
  esac
done

if [ "$results" -ef "$own" ]; then # the document that compares these figures with the paper's
  new=$(mktemp) && "$python" benchmarks/paper/compare.py > "$new" && cat "$new" > docs/paper-comparison.md
  rm -f "$new"
fi

if [ "${#failed[@]}" -gt 0 ]; then
  echo "benchmarks/gpu.sh: these steps failed, see their output in $results: ${failed[*]}" >&2
  exit 1
fi
echo "benchmarks/gpu.sh: all done, results in $results" >&2
