#!/bin/bash
# The tables of docs/results.md, one command each: benchmarks/tables.sh known|known-layers|before|pareto|text|ahead|far|plain|plain-even|even|same
# An interrupted table goes on where it stopped. Two processes, one core each.
set -e
cd "$(dirname "$0")/.."
out=benchmarks/results/$1
rivals=random,local,h2o,snapkv,elastic-paper,elastic-evict,elastic
case $1 in
known)  args="--limit 100 --policies $rivals --budgets 0.5,0.3,0.2,0.1 --layers even --metrics forced,exact" ;;
known-layers) args="--limit 100 --policies elastic --budgets 0.5,0.3,0.2,0.1 --metrics forced,exact" ;;
before) args="--limit 40 --policies h2o,snapkv,elastic-evict,elastic --budgets 0.5,0.2 --before --metrics forced,exact" ;;
pareto) args="--limit 10 --policies elastic --budgets 0.5,0.3,0.2 --kv-type f16,q8_0,q4_0 --metrics forced,exact" ;;
text)   args="--data benchmarks/text_set/text.json --policies local,h2o,snapkv,elastic --budgets 0.2 --metrics forced,exact" ;;
ahead)  args="--data benchmarks/text_set/text.json --policies h2o,snapkv --budgets 0.2 --probe 16 --layers even --metrics forced,exact" ;;
even)   args="--data benchmarks/text_set/text.json --policies elastic --budgets 0.2 --layers even --metrics forced,exact" ;;
far)    args="--data benchmarks/text_set/text.json --policies elastic --budgets 0.2 --probe 32 --layers even --metrics forced,exact" ;;
plain)  args="--data benchmarks/text_set/text.json --policies elastic --budgets 0.2 --probe 0 --metrics forced,exact" ;;
plain-even) args="--data benchmarks/text_set/text.json --policies elastic --budgets 0.2 --probe 0 --layers even --metrics forced,exact" ;;
same)   args="--split dev --limit 20 --policies h2o,elastic --budgets 0.2 --metrics forced,exact" ;;
*)      echo "usage: $0 known|known-layers|before|pareto|text|ahead|far|plain|plain-even|even|same" >&2; exit 2 ;;
esac
run() { # shard, more arguments
    OMP_NUM_THREADS=1 "${ELASTIC_LLAMA:-.venv/bin/elastic-llama}" eval $args --parallel 10 --shard "$1" --out "$out" "${@:2}"
}
both() {
    run 0/2 "$@" > /dev/null &
    run 1/2 "$@" > /dev/null
    wait
}
if [ "$1" != same ]; then
    both
    run 0/2   # both are done: the whole table
    exit
fi
compare() { # folder; runs come as lines of a name and more arguments, the first is what the others are compared with
    folder=$1
    while read -r name more; do
        out=$folder/$name
        both $more < /dev/null
    done
    "${PYTHON:-.venv/bin/python}" benchmarks/compare_runs.py "$folder"
}
compare benchmarks/results/same <<'RUNS'
base
again
threads -t 2
ubatch -ub 64
alone --parallel 1
RUNS
