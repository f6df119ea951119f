#!/usr/bin/env bash
# A quarter of an hour on a GPU, as two commands on one machine:
#
#   bash tools/gpu_run.sh a OUT   430 s: every kernel right, launch configurations tuned, rows of the kernels
#   bash tools/gpu_run.sh b OUT   290 s: whole runs beside diffusers', compiled graphs, engines that are installed
#
# Needs a python3 with a CUDA build of torch; no index, no git, no build. Where diffusers is not installed, its wheel in
# .whl/ serves. Each step has its time and cannot stop the next; what it found is in OUT as soon as it is there:
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
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$state/cache
export TRITON_CACHE_DIR=$state/cache/triton TORCHINDUCTOR_CACHE_DIR=$state/cache/inductor TORCHINDUCTOR_COMPILE_THREADS=10
export COMMIT=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || true)}
python=(${PYTHON:-python3})
only=
if [ "${DRY:-}" = 1 ]; then
    budget=$((30 * budget)) only="(one_in_every_batch and 64x8x160 and float16) or table_says"
    python+=(tools/cuda_stand_in.py)
    export TRITON_INTERPRET=1
fi
table=$site/diffumask_fast/kernels/tuned.json

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
        timeout -s INT -k 5 "$seconds" "$@" >>"$out/log.txt" 2>&1 || code=$?
    fi
    case $code in 0) code=done ;; 124 | 137) code="out of time" ;; *) code=failed ;; esac
    printf '%-12s %-12s %4d s\n' "$name" "$code" $((SECONDS - begun)) | tee -a "$out/summary.txt"
}

python_step() { step "$1" "$2" "${python[@]}" tools/gpu_steps.py "${@:3}"; }

tests() { # NAME SECONDS FILES...: tests that need a GPU; Ctrl-C, which ends them in time, still leaves the report
    step "$1" "$2" "${python[@]}" -m pytest -q -m gpu -p no:cacheprovider -k "$only" --junitxml "$out/$1.xml" "${@:3}"
}

background() { # STOP or CONT the compilation that runs beside the kernels' steps
    [ -s "$state/compile.pid" ] && kill "-$1" -- "-$(cat "$state/compile.pid")" 2>/dev/null
    return 0
}

make_site() {
    rm -rf "$state" && mkdir -p "$site"
    cp -r diffumask_fast "$site/" && cp -r kernels export bench "$site/diffumask_fast/" || return 1
    shopt -s nullglob
    for wheel in .whl/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$site" || return 1; done
}

part_a() {
    make_site || { say "The package could not be copied to $site."; exit 1; }
    python_step environment 20 environment "$out"
    python_step tables 20 tables "$state"
    cp "$state/triton.json" "$table"
    setsid "${python[@]}" tools/gpu_steps.py compile >"$state/compile.log" 2>&1 &
    echo $! >"$state/compile.pid"
    step warm 40 bash -c 'for i in 0 1 2 3; do "$@" tools/gpu_steps.py warm $i 4 & jobs+=($!); done
        for job in "${jobs[@]}"; do wait "$job" || failed=1; done; exit ${failed:-0}' warm "${python[@]}"
    tests kernels 90 $(grep -l 'mark\.gpu' tests/test_*.py | grep -v -e gpu_stream -e gpu_engines -e tensorrt)
    only=${only:+torch} tests stream 15 "tests/test_gpu_stream.py::test_a_stream_gives_what_calls_give[torch]"
    background STOP
    python_step sdpa 20 rows "$out" sdpa
    cp "$table" "$out/tuned.json"
    python_step tune 90 tune "$out"
    cp "$out/tuned.json" "$state/tuned.json"
    cp "$out/tuned.json" "$table"
    python_step rows 90 rows "$out" kernels
    background CONT
}

part_b() {
    [ -d "$site" ] || { say "Run part a first, on the same machine."; exit 1; }
    cp "$state/triton.json" "$table"
    step compiled 70 bash -c 'while kill -0 "$0" 2>/dev/null; do sleep 1; done; cat "$1"; ! grep -q ^Traceback "$1"' \
        "$(cat "$state/compile.pid")" "$state/compile.log"
    python_step stock 60 rows "$out" stock
    python_step graphs 60 rows "$out" graphs
    for form in triton sdpa; do
        cp "$state/$form.json" "$table"
        python_step "maps-$form" 25 rows "$out" maps
    done
    cp "$state/triton.json" "$table"
    only=${only:+compile} tests stream 30 "tests/test_gpu_stream.py::test_a_stream_gives_what_calls_give[compile]"
    only=${only:+onnx} tests engines 45 tests/test_gpu_engines.py
    background KILL
}

"part_$part"
say "$(grep -c . "$out/summary.txt") steps in $SECONDS s; rows: $(cat "$out/rows.jsonl" 2>/dev/null | wc -l)"
