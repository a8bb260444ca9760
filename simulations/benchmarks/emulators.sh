#!/bin/sh
# The tables of docs/emulators.md. Every candidate of SmolLM2 at half of the middle's bytes, one data owner with all four
# genres; what stands in runs/choose-smollm2 already isn't measured again. From the repository root, in the environment
# of `make venv`:
#
#     sh simulations/benchmarks/emulators.sh            # one seed, all candidates: about 45 minutes on 2 CPU cores
#     sh simulations/benchmarks/emulators.sh 3          # three seeds
set -eu
texts="${OFFSITE_FL_CACHE:-$HOME/.cache/offsite-fl}/quickstart"
exec offsite-fl choose smollm2 --budget 50% --seeds "${1:-1}" --out runs/choose-smollm2 \
    --calibration "$texts/public.txt" --held-out-tokens 1024 \
    --data "$texts/comedies.jsonl" --data "$texts/histories.jsonl" \
    --data "$texts/tragedies.jsonl" --data "$texts/poems.jsonl" \
    --test "$texts/test.jsonl" --test-tokens 3072 \
    --steps 16 --batch-size 4 --lr 5e-4 --full-fine-tuning \
    --candidate "quantize:bits=4,group=0" \
    --candidate "quantize:bits=4,group=64" \
    --candidate "low-rank:keep=0.975,targets=q_proj/k_proj/v_proj/o_proj+quantize:bits=4,group=0" \
    --candidate "quantize:{keep}" \
    --candidate "low-rank:{keep}" \
    --candidate "low-rank:{keep},mode=activation" \
    --candidate "low-rank:{keep},mode=plain" \
    --candidate "gradot:{keep}" \
    --candidate "gradot:{keep},allocation=global" \
    --candidate "smooth:{keep},mode=prox" \
    --candidate "smooth:{keep},mode=train,steps=24" \
    --candidate "prune:{keep},mode=structured" \
    --candidate "prune:{keep},mode=magnitude" \
    --candidate "crash:{keep},sharing=none" \
    --candidate "crash:{keep},sharing=all" \
    --candidate "scaleot:{keep},steps=40" \
    --candidate "layer-drop:{keep}" \
    --candidate "layer-drop:{keep}+distill:steps=40" \
    --candidate "low-rank:{keep}+loss-margin:steps=16" \
    --candidate "random:{keep}" \
    --candidate "first:{keep}" \
    --candidate "last:{keep}" \
    --candidate "similarity:{keep}"
