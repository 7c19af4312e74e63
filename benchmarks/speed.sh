#!/bin/bash
# The rows of docs/speed.md, one command each, on a machine that does nothing else:
#   benchmarks/speed.sh hires|seqs16|seqs8|image|images8|kv-types|full-image|full-hires|embedded|flat|off|text|layers
# The models are made once, into $SHAPED (build/shaped).
set -e -o pipefail
cd "$(dirname "$0")/.."
shaped=${SHAPED:-build/shaped}
python=${PYTHON:-.venv/bin/python}
out=benchmarks/results/speed
mkdir -p "$out" "$shaped"

model() { # layers
    [ -f "$shaped/$1.gguf" ] || "$python" benchmarks/shaped_model.py "$shaped/$1.gguf" --layers "$1" >&2
    echo "$shaped/$1.gguf"
}
bench() { # name, arguments
    rm -f "$out/$1.new"
    "${ELASTIC_LLAMA:-.venv/bin/elastic-llama}" bench --out "$out/$1.new" "${@:2}" | tee "$out/$1.md"
    mv "$out/$1.new" "$out/$1.jsonl"
}
case $1 in
hires)      bench hires      -m "$(model 4)" --scenarios hires -r 2 ;;
image)      bench image      -m "$(model 4)" --scenarios image -r 3 ;;
kv-types)   bench kv-types   -m "$(model 4)" --scenarios image,hires --kv-types q8_0,q4_0 -fa on -r 1 -n 80 ;;
images8)    bench images8    -m "$(model 4)" --scenarios images8,images8-capped -fa off -r 1 ;;
text)       bench text       -m "$(model 4)" --scenarios text -r 2 -n 40 ;;
layers)     bench layers-even -m "$(model 4)" --scenarios text -fa on -r 2 -n 40 --layers even
            bench layers     -m "$(model 4)" --scenarios text -fa on -r 2 -n 40 --layers 0.5,0.5,2.5,0.5 ;;
seqs8)      bench seqs8      -m "$(model 4)" --scenarios seqs8 -fa off,on -r 1 ;;
seqs16)     bench seqs16     -m "$(model 4)" --scenarios seqs16 -fa off -r 1 ;;
full-image) bench full-image -m "$(model 32)" --scenarios image -fa off -r 1 -n 80 ;;
full-hires) bench full-hires -m "$(model 32)" --scenarios hires -fa off -r 1 -n 80 ;;
embedded)   bench embedded   --scenarios image,hires -r 3 ;;
flat)       "$python" benchmarks/flat.py --out "$out/flat.json" | tee "$out/flat.md" ;;
off)        "$python" benchmarks/off_vs_stock.py "$(model 4)" --out "$out/off.json" | tee "$out/off.md" ;;
*)          sed -n 2,4p "$0" >&2; exit 2 ;;
esac
