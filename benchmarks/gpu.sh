#!/usr/bin/env bash
# An hour on a GPU, in stages that are useful alone: the test suite with compiled kernels, launch settings (rpo_kernels tune: writes
# rpo_kernels/kernels/launch_table.json, and a copy of it), chunks of the linear path, what calls cost the CPU, and with these settings
# the benchmark table. Needs torch, triton and pytest.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [tests] [tune] [chunks] [host] [bench]       (all by default)
#
# Limits in seconds, each a variable: TESTS_S=540 TUNE_S=540 CHUNKS_S=200 BENCH_S=540. A stage that is cut short keeps what it has
# measured, and bench goes on where it stopped when started again on the same device and commit (RPO_COMMIT names that of a copy
# without history). PYTHON chooses the interpreter, TESTS names test files, BENCH_ARGS is handed to pytest (-k "Qwen3 and 8192").
# The exit code is the first that was not 0.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD out=benchmarks/results dry="" stages=()
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --out) out=$2; shift ;;
    tests | bench | tune | chunks | host) stages+=("$1") ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift
done
((${#stages[@]})) || stages=(tests tune chunks host bench)
mkdir -p "$out"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

"$PYTHON" -c 'import torch; print("torch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU")' || exit 2
if [[ -z $dry ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: nothing to measure; --dry-run goes through the motions" >&2
  exit 2
fi

# Soft limits end in time to write tables and plots; the hard ones, a minute later, only end what hangs. An interrupted pytest
# still tells the failures that it has seen, a terminated one nothing.
limited() { timeout --signal=INT --kill-after=30 "$@"; }

tests() {
  # Warnings of another torch or of other plugins are no failures here.
  local options=(-q --continue-on-collection-errors -p no:cacheprovider -W default)
  has xdist && [[ -z $dry ]] && options+=(-n "${TEST_WORKERS:-12}" --dist loadgroup)
  [[ -n $dry ]] && options=(-q -p no:cacheprovider --collect-only)
  limited "${TESTS_S:-540}" "$PYTHON" -m pytest ${TESTS:-tests} "${options[@]}" >"$out/tests.txt" 2>&1
  local status=$?
  tail -n 25 "$out/tests.txt"
  return $status
}

bench() {
  local seconds=${BENCH_S:-540} options=(-q -p no:cacheprovider --results "$out/bench.json")
  [[ -n $dry ]] && options+=(--smoke -k "tiny and 128 and loss and (naive or rpo_kernels)")
  has pytest_benchmark && options+=(--benchmark-columns=median,iqr,rounds)
  # shellcheck disable=SC2086
  eval "limited $((seconds + 60)) \"\$PYTHON\" -m pytest benchmarks/bench.py \"\${options[@]}\" --budget $seconds ${BENCH_ARGS:-}"
}

tune() {
  local seconds=${TUNE_S:-540} table=rpo_kernels/kernels/launch_table.json
  local options=(--vocab 49152 128256 151936 262144 --dtype bfloat16 float32 --seconds "$seconds")
  # Dry, settings are chosen by machine code for another table: no GPU is needed for that.
  [[ -n $dry ]] && table=$out/launch_table.json options=(--vocab 151936 --dtype bfloat16 --op backward --audit sm_90)
  limited $((seconds + 60)) "$PYTHON" -m rpo_kernels tune "${options[@]}" --output "$table" | tee "$out/tune.txt"
  local status=${PIPESTATUS[0]}
  [[ -n $dry ]] || cp "$table" "$out/launch_table.json"
  return "$status"
}

chunks() {
  local seconds=${CHUNKS_S:-200}
  limited $((seconds + 60)) "$PYTHON" benchmarks/chunks.py --budget "$seconds" --results "$out/chunks.json" ${dry:+--dry-run}
}

host() { limited 120 "$PYTHON" benchmarks/host.py --json "$out/host.json" ${dry:+--rounds 20}; }

status=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  started=$SECONDS
  "$stage"
  code=$?
  echo "== $stage: exit code $code after $((SECONDS - started)) s"
  ((status)) || status=$code
done
exit "$status"
