#!/bin/sh
# The five rows in accuracy on multiple choice over three seeds (docs/quality.md): SmolLM2, four data owners with other books
# of the Bible each. From the repository root, in the environment of `make venv`; a run that has its report isn't done again:
#   sh simulations/benchmarks/choices.sh
# More arguments go to each run: --set emulator=quantize:bits=4,group=0
set -eu
folders=""
mkdir -p runs/choices
for seed in 0 1 2; do
    out="runs/choices/seed-$seed"
    folders="$folders $out"
    [ -f "$out/report.csv" ] || python -m simulations.demo --task choices --out "$out" --set "seed=$seed" "$@" \
        >"$out.log" 2>&1
done
# shellcheck disable=SC2086
python -m simulations.benchmarks.rows $folders
