#!/bin/sh
# The five rows in accuracy over three seeds (docs/vision.md): an image classifier (images) or a text encoder (texts), four
# data owners whose classes differ. From the repository root, in the environment of `make venv`, after
# `make vision-data`:
#   sh simulations/benchmarks/vision.sh images
#   sh simulations/benchmarks/vision.sh texts
# More arguments go to each run: --set data.partition=iid
set -eu
task="$1"
shift
folders=""
for seed in 1 2 3; do
    out="runs/classify-$task/seed-$seed"
    folders="$folders $out"
    mkdir -p "runs/classify-$task"
    [ -f "$out/report.csv" ] || python -m simulations.classify --task "$task" --out "$out" --set "seed=$seed" "$@" \
        >"$out.log" 2>&1
done
# shellcheck disable=SC2086
python -m simulations.benchmarks.rows $folders
