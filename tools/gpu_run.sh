#!/usr/bin/env bash
# A quarter of an hour on a GPU, as two commands on one machine:
#
#   bash tools/gpu_run.sh a OUT   430 s: every kernel right, launch configurations tuned, rows of the kernels
#   bash tools/gpu_run.sh b OUT   290 s: whole runs beside diffusers', compiled graphs, engines that are installed
#
# Needs a python3 with a CUDA build of torch; no index, no git, no build. Where diffusers is not installed, its wheel in
# .whl/ serves. Each step has a time limit and cannot stop the next; its results are in OUT at once:
# summary.txt (a line a step), log.txt, rows.jsonl, tuned.json, env.json and what the tests said (*.xml).
# DRY=1 runs the same on a CPU, on the smallest shapes, with a stand-in for CUDA. PYTHON names another interpreter,
# COMMIT what the rows are to call this version.
set -uo pipefail
part=${1:-} out=${2:-}
case $part in a) budget=430 ;; b) budget=290 ;; *) part= ;; esac
if [ -z "$part" ] || [ -z "$out" ]; then
    echo "usage: bash tools/gpu_run.sh a|b OUT" >&2
    exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 1
state=$PWD/build/gpu
site=$state/site
table=$site/diffumask_fast/kernels/tuned.json
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME=$state/cache
export TRITON_CACHE_DIR=$state/cache/triton TORCHINDUCTOR_CACHE_DIR=$state/cache/inductor TORCHINDUCTOR_COMPILE_THREADS=10
export CI=  # a test of an engine that is not installed is skipped, and that is no failure here
export COMMIT=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || true)}
plain=${PYTHON:-python3} python=(${PYTHON:-python3}) only= processes=()
if [ "${DRY:-}" = 1 ]; then
    budget=$((30 * budget)) only="(one_in_every_batch and 64x8x160) or table_says"
    python+=(tools/cuda_stand_in.py)
    export TRITON_INTERPRET=1
elif "$plain" -c 'import xdist' 2>/dev/null; then
    processes=(-n 4)
fi

say() { echo "$*" | tee -a "$out/log.txt"; }

# step NAME SECONDS COMMAND...: run it within its time and what is left, and note how it ended
step() {
    local name=$1 seconds=$2 code=0 begun=$SECONDS left
    shift 2
    [ "${DRY:-}" = 1 ] && seconds=$((30 * seconds))
    left=$((budget - SECONDS))
    seconds=$((seconds < left ? seconds : left))
    say "== $name"
    if [ "$seconds" -le 3 ]; then
        code=124
    else
        timeout -s INT -k 15 "$seconds" env --default-signal=INT "$@" >>"$out/log.txt" 2>&1 || code=$?
    fi
    case $code in 0) code=done ;; 124 | 137) code="out of time" ;; *) code=failed ;; esac
    printf '%-12s %-12s %4d s\n' "$name" "$code" $((SECONDS - begun)) | tee -a "$out/summary.txt"
}

python_step() { step "$1" "$2" "${python[@]}" tools/gpu_steps.py "${@:3}"; }

tests() { # NAME SECONDS ARGUMENTS...: tests that need a GPU; Ctrl-C, which ends them in time, still leaves the report
    step "$1" "$2" "${python[@]}" -m pytest -v -m gpu -p no:cacheprovider --continue-on-collection-errors \
        -k "$only" --junitxml "$out/$1.xml" "${@:3}"
}

background() { # STOP, CONT or KILL the compilation that runs beside the kernels' steps
    [ ! -s "$state/compile.pid" ] || [ -s "$state/code" ] || kill "-$1" -- "-$(cat "$state/compile.pid")" 2>/dev/null
    return 0
}

make_site() { # a copy of the package on the path, and tables that say which implementation is launched
    local capability=9.0 wheel
    background KILL
    rm -rf "$site" "$state"/*.json "$state"/{go,code,compile.*} && mkdir -p "$site"
    cp -r diffumask_fast "$site/" && cp -r kernels export bench "$site/diffumask_fast/" || return 1
    shopt -s nullglob
    for wheel in .whl/*.whl; do "$plain" -m zipfile -e "$wheel" "$site" || return 1; done
    [ "${DRY:-}" = 1 ] || capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    "$plain" tools/gpu_steps.py tables "$table" "$state" "sm_${capability/./}" && cp "$state/triton.json" "$table"
}

part_a() {
    make_site >>"$out/log.txt" 2>&1 || { say "The package could not be laid out in $state."; exit 1; }
    # setsid: the process outlives this command, for part b
    setsid bash -c '"${@:2}"; echo $? >"$1"' compile "$state/code" "${python[@]}" tools/gpu_steps.py whole_runs "$state" \
        >"$state/compile.log" 2>&1 &
    echo $! >"$state/compile.pid"
    python_step environment 60 environment "$out"
    step warm 70 bash -c 'trap '\''kill "${jobs[@]}"; exit 1'\'' INT TERM
        for i in 0 1 2 3; do "$@" tools/gpu_steps.py warm $i 4 & jobs+=($!); done
        for job in "${jobs[@]}"; do wait "$job" || failed=1; done; exit ${failed:-0}' warm "${python[@]}"
    only=${only:+names_the_gpu} tests masks 40 \
        tests/test_gpu_masks.py tests/test_rows.py tests/test_processor.py tests/test_choice.py
    tests kernels 110 "${processes[@]}" tests/test_gpu_kernels.py
    background STOP
    cp "$table" "$out/tuned.json"
    python_step tune 70 tune "$out"
    cp "$out/tuned.json" "$table"
    python_step rows 80 rows "$out" kernels
    python_step sdpa 45 rows "$out" sdpa
    only=${only:+torch} tests timing 60 "tests/test_gpu_stream.py::test_a_stream_gives_what_calls_give[torch]" \
        tests/test_harness.py
    background CONT
    cat "$state/compile.log" >>"$out/log.txt"
}

part_b() {
    [ -s "$state/compile.pid" ] || { say "Run part a first, on the same machine."; exit 1; }
    background CONT
    cp "$state/triton.json" "$table"
    echo "$out" >"$state/go"
    step whole_runs 150 bash -c 'until [ -s "$0" ]; do sleep 1; done; cat "$1"; exit "$(cat "$0")"' \
        "$state/code" "$state/compile.log"
    background KILL
    python_step maps 75 maps "$out" "$state" "$table"
    cp "$state/triton.json" "$table"
    only=${only:+compile} tests stream 60 "tests/test_gpu_stream.py::test_a_stream_gives_what_calls_give[compile]"
    only=${only:+onnx} tests engines 60 tests/test_gpu_engines.py
}

"part_$part"
say "$(grep -c . "$out/summary.txt") steps in $SECONDS s; rows: $(cat "$out/rows.jsonl" 2>/dev/null | wc -l)"
