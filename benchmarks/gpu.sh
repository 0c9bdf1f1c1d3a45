#!/usr/bin/env bash
# What there is to do on a GPU, in stages. Each ends within 540 seconds with its tables and plots in
# a folder, and goes on where it stopped when started again with that folder, on the same device,
# commit and torch. Needs torch, triton and pytest.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--wheels FOLDER] [STAGE ...]     (default: all)
#
#   tests          the test suite, with compiled kernels
#   tune           launch settings, by the clock: launch_table.json, which later stages use
#   chunks         rows of a chunk and workspaces of the linear path
#   host           what calls cost the CPU
#   bench-peers    the benchmark table: this library, naive PyTorch, and each peer that is installed
#   bench-compile  the same table, of those that compile for each shape: torch.compile and Liger
#   longest        the longest pair of responses that fits into 16 GiB
#
# --wheels: of peers (benchmarks/peers.py lists them). --dry-run goes through the motions on a CPU.
# PYTHON chooses the interpreter, LIMIT_S another limit; RPO_COMMIT names the commit of a copy
# without history. The exit code is the first that was not 0.
set -uo pipefail
cd "$(dirname "$0")/.."
all=(tests tune chunks host bench-peers bench-compile longest)
root=$PWD out=benchmarks/results dry="" wheels="" stages=()
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --out) out=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    *)
      if [[ " ${all[*]} " != *" $1 "* ]]; then
        sed -n '2,19s/^# \{0,1\}//p' "$0"
        exit 2
      fi
      stages+=("$1")
      ;;
  esac
  shift
done
((${#stages[@]})) || stages=("${all[@]}")
mkdir -p "$out"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
commit=${RPO_COMMIT:-$(git describe --always --dirty=+changes --exclude='*' 2>/dev/null)}
export RPO_COMMIT=$commit

"$PYTHON" -c 'import torch
where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
print("torch", torch.__version__, "on", where)' || exit 2
no_gpu='import sys, torch; sys.exit(torch.cuda.is_available())'
if [[ -z $dry ]] && "$PYTHON" -c "$no_gpu"; then
  echo "no GPU: nothing to measure; --dry-run goes through the motions" >&2
  exit 2
fi
if [[ -n $wheels ]]; then
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  "$PYTHON" benchmarks/peers.py --wheels "$wheels" --target "$unpacked"
  PYTHONPATH+=:$unpacked
fi

# A stage begins nothing in its last 100 seconds, in which it writes tables and plots. What hangs is
# interrupted 40 seconds before the end, and killed at the end: an interrupted pytest still tells
# the failures that it has seen, a killed one nothing.
limit=${LIMIT_S:-540}
left() { echo $((limit - 100 - SECONDS + started)); }
limited() { timeout --signal=INT --kill-after=40 $((limit - 40 - SECONDS + started)) "$@"; }

tests() {
  # Warnings of another torch or of other plugins are no failures here.
  local options=(-q --continue-on-collection-errors -p no:cacheprovider -W default)
  options+=(-p benchmarks.resume --passed "$out/tests.json")
  has xdist && [[ -z $dry ]] && options+=(-n 12 --dist loadgroup)
  [[ -n $dry ]] && options+=(tests/evidence/test_architecture.py)
  limited "$PYTHON" -m pytest "${options[@]}" >"$out/tests.txt" 2>&1
  local status=$?
  tail -n 25 "$out/tests.txt"
  return $status
}

tune() {
  local what options dtypes=(bfloat16 float32) ops=(forward backward)
  [[ -n $dry ]] && dtypes=(bfloat16) ops=(backward)
  for dtype in "${dtypes[@]}"; do
    for op in "${ops[@]}"; do
      what="tuned: $op of $dtype at $commit"
      grep -qsFx "$what" "$out/tune.txt" && continue
      options=(--dtype "$dtype" --op "$op" --output "$out/launch_table.json" --seconds "$(left)")
      # Dry, settings are chosen by machine code: no GPU is needed for that.
      [[ -n $dry ]] && options+=(--audit sm_90)
      limited "$PYTHON" -m rpo_kernels tune --vocab 49152 128256 151936 262144 "${options[@]}" \
        | tee -a "$out/tune.txt" || return
      echo "$what" >>"$out/tune.txt"
    done
  done
}

chunks() {
  local options=(--budget "$(left)" --results "$out/chunks.json" ${dry:+--dry-run})
  limited "$PYTHON" benchmarks/chunks.py "${options[@]}"
}

host() { limited "$PYTHON" benchmarks/host.py --json "$out/host.json" ${dry:+--rounds 20}; }

bench() {
  local options=(-q -p no:cacheprovider --results "$out/bench.json" --budget "$(left)" -k "$1")
  [[ -n $dry ]] && options+=(--smoke -k "128 and (KTO or entropy) and ($1)")
  has pytest_benchmark && options+=(--benchmark-columns=median,iqr,rounds)
  limited "$PYTHON" -m pytest benchmarks/bench.py "${options[@]}"
}
bench-peers() { bench "not (compile or Liger)"; }
bench-compile() { bench "compile or Liger"; }

longest() {
  local options=(--budget "$(left)" --results "$out/longest.json" ${dry:+--dry-run})
  limited "$PYTHON" benchmarks/longest.py "${options[@]}"
}

status=0
for stage in "${stages[@]}"; do
  own=$out/launch_table.json
  [[ $stage != tune && -f $own ]] && export RPO_KERNELS_LAUNCH_TABLE=$own
  echo "== $stage"
  started=$SECONDS
  "$stage"
  code=$?
  echo "== $stage: exit code $code after $((SECONDS - started)) s"
  ((status)) || status=$code
done
exit "$status"
