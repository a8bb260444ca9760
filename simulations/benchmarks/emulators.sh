#!/bin/sh
# The tables of docs/emulators.md: emulators of SmolLM2 at half of the middle's bytes or less, one data owner with the
# texts of all four. What stands in runs/choose-smollm2 already isn't measured again, so it can be stopped at any time.
# From the repository root, in the environment of `make venv`:
#
#     sh simulations/benchmarks/emulators.sh all        # every training-free method, one seed: half an hour on 2 cores
#     sh simulations/benchmarks/emulators.sh few        # the two best with three seeds, without full fine-tuning
#     sh simulations/benchmarks/emulators.sh trained    # the methods that train, one seed: hours
set -eu
default="low-rank:keep=0.975,targets=q_proj/k_proj/v_proj/o_proj+quantize:bits=4,group=0"
case "${1:-all}" in
all)
    seeds=1 full=--full-fine-tuning
    set -- "quantize:bits=4,group=0" "quantize:bits=4,group=64" "$default" "quantize:{keep}" "low-rank:{keep}" \
        "low-rank:{keep},mode=activation" "low-rank:{keep},mode=plain" "gradot:{keep}" \
        "gradot:{keep},allocation=global" "smooth:{keep},mode=prox" "prune:{keep},mode=structured" \
        "prune:{keep},mode=magnitude" "crash:{keep},sharing=none" "crash:{keep},sharing=all" "layer-drop:{keep}" \
        "random:{keep}" "first:{keep}" "last:{keep}" "similarity:{keep}"
    ;;
few)
    seeds=3 full=
    set -- "quantize:bits=4,group=0" "quantize:bits=4,group=64"
    ;;
trained)
    seeds=1 full=--full-fine-tuning
    set -- "layer-drop:{keep}+distill:steps=40" "scaleot:{keep},steps=40" "smooth:{keep},mode=train,steps=24" \
        "low-rank:{keep}+loss-margin:steps=16"
    ;;
*)
    echo "usage: $0 [all|few|trained]" >&2
    exit 2
    ;;
esac
for spec; do
    set -- "$@" --candidate "$spec"
    shift
done
texts="${OFFSITE_FL_CACHE:-$HOME/.cache/offsite-fl}/quickstart"
exec offsite-fl choose smollm2 --budget 50% --seeds "$seeds" --out runs/choose-smollm2 \
    --calibration "$texts/public.txt" --held-out-tokens 1024 \
    --data "$texts/comedies.jsonl" --data "$texts/histories.jsonl" \
    --data "$texts/tragedies.jsonl" --data "$texts/poems.jsonl" \
    --test "$texts/test.jsonl" --test-tokens 3072 \
    --steps 16 --batch-size 4 --lr 5e-4 $full "$@"
