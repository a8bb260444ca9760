#!/bin/sh
# The tables of docs/vision.md on emulators: does any keep the digits' classifier protected while the plug-in gains? One data
# owner with everybody's images. What stands in the folder under runs/ already isn't measured again.
# From the repository root, in the environment of `make venv`, after `make vision-data`:
#
#     sh simulations/benchmarks/vision_emulators.sh          # all, one seed: a quarter of an hour on 2 cores
#     sh simulations/benchmarks/vision_emulators.sh SPEC...  # these, three seeds
set -eu
digits="${OFFSITE_FL_CACHE:-$HOME/.cache/offsite-fl}/digits-1" model=runs/digits-model seeds=3 full=
if [ $# = 0 ]; then
    seeds=1 full="--full-fine-tuning --full-lr 1e-5 --full-lr 3e-5"
    set -- "low-rank:keep=0.5" "low-rank:keep=0.2" "low-rank:keep=0.1,mode=plain" "gradot:keep=0.1" "smooth:keep=0.1" \
        "prune:keep=0.1,mode=structured" "crash:keep=2" "layer-drop:keep=2" "first:keep=1" "last:keep=1" \
        "random:keep=1" "quantize:bits=4,group=0"
fi
for spec; do
    set -- "$@" --candidate "$spec"
    shift
done
[ -f "$model/config.json" ] || python -m simulations.benchmarks.digits_model "$model"
exec offsite-fl choose "$model" "$@" --budget 50% --seeds "$seeds" --out runs/choose-digits \
    --calibration "$digits/public.parquet" --data "$digits/train.parquet" --test "$digits/test.parquet" \
    --test-examples 300 --steps 40 --batch-size 8 --lr 2e-4 --set warmup-steps=4 $full
