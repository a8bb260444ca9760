#!/bin/sh
# The tables of docs/emulators.md: emulators side by side, one data owner with the texts of all four. What stands in
# the folder under runs/ already isn't measured again, so it can be stopped at any time and goes on where it was.
# The pages of all, few, trained and ours are written to one folder, over each other; cells stay and are shared.
# From the repository root, in the environment of `make venv` (for pico after `make pico`):
#
#     sh simulations/benchmarks/emulators.sh all        # SmolLM2: every training-free method, one seed: half an hour on 2 cores
#     sh simulations/benchmarks/emulators.sh few        # SmolLM2: the best, what papers start from, controls: three seeds
#     sh simulations/benchmarks/emulators.sh trained    # SmolLM2: the methods that train, one seed
#     sh simulations/benchmarks/emulators.sh ours       # SmolLM2: what this project adds to the papers, one seed
#     sh simulations/benchmarks/emulators.sh costs      # SmolLM2: what building takes, nothing tuned: a quarter of an hour
#     sh simulations/benchmarks/emulators.sh pico 30%   # the small model: every method, three seeds; half an hour
#     sh simulations/benchmarks/emulators.sh pico-ours  # the small model: what this project adds, and what it starts from, three seeds
set -eu
cache="${OFFSITE_FL_CACHE:-$HOME/.cache/offsite-fl}"
default="low-rank:keep=0.975,targets=q_proj/k_proj/v_proj/o_proj+quantize:bits=4,group=0"
set_of="${1:-all}" budget="${2:-50%}" seeds=3 full=
case "$set_of" in
all | trained | ours) seeds=1 full=--full-fine-tuning ;;
pico*) full="--full-fine-tuning --full-lr 1e-3 --full-lr 2e-3" ;;
esac
case "$set_of" in
all | pico | costs)
    set -- "quantize:bits=4,group=0" "quantize:bits=4,group=64" "$default" "quantize:{keep}" "low-rank:{keep}" \
        "low-rank:{keep},mode=activation" "low-rank:{keep},mode=plain" "gradot:{keep}" \
        "gradot:{keep},allocation=global" "smooth:{keep},mode=prox" "prune:{keep},mode=structured" \
        "prune:{keep},mode=magnitude" "crash:{keep},sharing=none" "crash:{keep},sharing=all" "layer-drop:{keep}" \
        "random:{keep}" "first:{keep}" "last:{keep}" "similarity:{keep}"
    ;;
few)
    set -- "quantize:bits=4,group=0" "quantize:bits=4,group=64" "$default" "gradot:{keep}" \
        "gradot:{keep}+align:where=all" "layer-drop:{keep}+distill:steps=40" "crash:{keep},sharing=all" \
        "layer-drop:{keep}" "random:{keep}" "first:{keep}" "last:{keep}" "similarity:{keep}"
    ;;
trained)
    set -- "layer-drop:{keep}+distill:steps=40" "scaleot:{keep},steps=40" "smooth:{keep},mode=train,steps=24,lam=0.01,lr=1e-4" \
        "low-rank:{keep}+loss-margin:steps=16"
    ;;
ours)
    set -- "prune:{keep},mode=structured+align:where=all" "gradot:{keep}+align:where=all" \
        "layer-drop:{keep}+align:where=all" "gradient-match:{keep}"
    ;;
pico-ours)
    set -- "layer-drop:{keep}+align" "layer-drop:{keep}+align:where=all" "gradot:{keep}+align" \
        "gradot:{keep}+align:where=all" "prune:{keep},mode=structured+align" \
        "prune:{keep},mode=structured+align:where=all" "low-rank:{keep}+align" "crash:{keep}+align:where=all" \
        "gradient-match:{keep}" "gradient-match:{keep}+align:where=all" \
        "layer-drop:{keep}+distill:steps=100,w-grad=10" "gradient-match:{keep}+distill:steps=100,w-grad=10" \
        "layer-drop:{keep}" "gradot:{keep}" "prune:{keep},mode=structured" "low-rank:{keep}" "crash:{keep}" \
        "layer-drop:{keep}+distill:steps=100"
    ;;
*)
    echo "usage: $0 [all|few|trained|ours|costs|pico|pico-ours [BUDGET]]" >&2
    exit 2
    ;;
esac
if [ "$set_of" = pico ]; then
    set -- "$@" "layer-drop:{keep}+distill:steps=100" "scaleot:{keep},steps=100" "smooth:{keep},mode=train,steps=100,lam=0.01,lr=1e-4" \
        "low-rank:{keep}+loss-margin:steps=100,lr=1e-4"
fi
if [ "$set_of" = costs ]; then
    set -- "$@" "gradot:{keep}+align:where=all" "gradient-match:{keep}"
fi
for spec; do
    set -- "$@" --candidate "$spec"
    shift
done
if [ "$set_of" = costs ]; then
    exec offsite-fl choose smollm2 "$@" --budget "$budget" --out runs/choose-costs \
        --calibration "$cache/quickstart/public.txt" --held-out-tokens 1024
fi
if [ "$set_of" != "${set_of#pico}" ]; then
    texts="$cache/quickstart-bible" out="runs/choose-$set_of-${budget%\%}"
    set -- "$cache/pico" "$@" --held-out-tokens 4096 --test-tokens 8192 --steps 32 --batch-size 16 --lr 1e-3
    owners="wisdom prophets gospels letters"
else
    texts="$cache/quickstart" out=runs/choose-smollm2
    set -- smollm2 "$@" --held-out-tokens 1024 --test-tokens 3072 --steps 16 --batch-size 4 --lr 5e-4
    owners="comedies histories tragedies poems"
fi
for owner in $owners; do
    set -- "$@" --data "$texts/$owner.jsonl"
done
exec offsite-fl choose "$@" --budget "$budget" --seeds "$seeds" --out "$out" \
    --calibration "$texts/public.txt" --test "$texts/test.jsonl" $full
