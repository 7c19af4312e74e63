#!/bin/bash
# The tables of docs/results.md, one command each: benchmarks/tables.sh images-present|images-present-rivals|images|images-layers|
#   images-query-agnostic|pareto|text|text-second|text-budgets|long-second|long-embedded|text-probe32|text-noprobe|text-noprobe-uniform|uniform-layers|baselines-probe16|determinism
# An interrupted table goes on where it stopped. Two processes, one core each. At the end the folder is made what is committed.
set -e
cd "$(dirname "$0")/.."
out=benchmarks/results/$1
python=${PYTHON:-.venv/bin/python}
rivals=random,local,h2o,snapkv,elastic-paper,elastic-evict,elastic
text="--data benchmarks/text_set/text.json --budgets 0.2"
all="--data benchmarks/text_set/text.json --budgets 0.5,0.3,0.2,0.1"
texts=random,local,h2o,snapkv,pyramidkv,knorm,expected-attention,elastic-paper,elastic-evict,elastic
even="--layers even"
case $1 in
images)        args="--limit 100 --policies $rivals --budgets 0.5,0.3,0.2,0.1 $even --metrics forced,exact" ;;
images-present) args="--limit 100 --policies elastic --budgets 0.2 --metrics forced,exact" ;;
images-present-rivals)
               args="--limit 100 --policies ${rivals%,*} --budgets 0.2 --metrics forced,exact" ;;
images-layers) args="--limit 100 --policies elastic --budgets 0.5,0.3,0.2,0.1 --metrics forced,exact" ;;
images-query-agnostic)
               args="--limit 40 --policies h2o,snapkv,elastic-evict,elastic --budgets 0.5,0.2 --before --metrics forced,exact" ;;
pareto)        args="--limit 10 --policies elastic --budgets 0.5,0.3,0.2 --kv-type f16,q8_0,q4_0 --metrics forced,exact" ;;
text)          args="$text --policies local,h2o,snapkv,elastic --metrics forced,exact" ;;
text-budgets)  args="$all --policies $texts --metrics forced,exact" ;;
text-second)   args="$all --policies $texts --metrics forced,exact -m $("$python" benchmarks/second_model.py)" ;;
long-second)   "$python" benchmarks/long_prompts.py --model second --out "$out"
               exec "$python" benchmarks/prune_results.py "$out" ;;
long-embedded) "$python" benchmarks/long_prompts.py --model embedded --sizes 2000,4000 --out "$out"
               exec "$python" benchmarks/prune_results.py "$out" ;;
text-probe32)  args="$text --policies elastic --probe 32 $even --metrics forced,exact" ;;
text-noprobe)  args="$text --policies elastic --probe 0 --metrics forced,exact" ;;
text-noprobe-uniform) args="$text --policies elastic --probe 0 $even --metrics forced,exact" ;;
uniform-layers)       args="$text --policies elastic --layers even --metrics forced,exact" ;;
baselines-probe16)    args="$text --policies h2o,snapkv --probe 16 $even --metrics forced,exact" ;;
determinism)   args="--split dev --limit 20 --policies h2o,elastic --budgets 0.2 --metrics forced,exact" ;;
*)             sed -n 2,3p "$0" >&2; exit 2 ;;
esac
run() { # shard, more arguments
    OMP_NUM_THREADS=1 "${ELASTIC_LLAMA:-.venv/bin/elastic-llama}" eval $args --parallel 10 --shard "$1" --out "$out" "${@:2}"
}
both() {
    run 0/2 "$@" > /dev/null &
    run 1/2 "$@" > /dev/null
    wait
}
prune() { # more arguments
    "$python" benchmarks/prune_results.py "$out" "$@"
}
if [ "$1" != determinism ]; then
    both
    run 0/2   # both are done: the whole table
    case $1 in # docs/results.md shows one figure of each
    images-layers)
        "$python" benchmarks/report.py benchmarks/results/images "$out" --figures "$out" > /dev/null
        prune --keep ppl.png ;;
    pareto) prune --keep bytes.png ;;
    *)      prune ;;
    esac
    exit
fi
compare() { # folder; runs come as lines of a name and more arguments, the first is what the others are compared with
    folder=$1
    while read -r name more; do
        out=$folder/$name
        both $more < /dev/null
        prune
    done
    "$python" benchmarks/compare_runs.py "$folder"
}
compare benchmarks/results/determinism <<'RUNS'
base
again
threads -t 2
ubatch -ub 64
alone --parallel 1
RUNS
