#!/bin/sh
# Ways to tune and to plug in that should carry more of the adapter over to the full model (docs/emulators.md): SmolLM2,
# three seeds, the settings of emulators.sh. Each can be stopped and goes on where it was.
# From the repository root, in the environment of `make venv`:
#
#     sh simulations/benchmarks/plug_in.sh scale       # parts of the update, chosen on public text
#     sh simulations/benchmarks/plug_in.sh end         # the adapter only at the end: the last four blocks
#     sh simulations/benchmarks/plug_in.sh proximal    # tuning that is held near the values handed out
#     sh simulations/benchmarks/plug_in.sh repair      # the plug-in with and without the repair taken out
set -eu
texts="${OFFSITE_FL_CACHE:-$HOME/.cache/offsite-fl}/quickstart" emulator="quantize:bits=4,group=0"
owners="comedies histories tragedies poems"
compare() {
    out="runs/plug-in-$1" && shift
    for owner in $owners; do
        set -- "$@" --data "$texts/$owner.jsonl"
    done
    exec offsite-fl choose smollm2 --candidate "$emulator" --budget 50% --seeds 3 --out "$out" \
        --calibration "$texts/public.txt" --held-out-tokens 1024 --test "$texts/test.jsonl" --test-tokens 3072 \
        --steps 16 --batch-size 4 --lr 5e-4 "$@"
}
case "${1:-}" in
scale) compare scale --scale 0.5 --scale 0.7 --scale 0.85 --scale 1 ;;
end) compare end --split 0-4 ;;
proximal) compare proximal --set proximal-mu=0.1 ;;
repair) compare repair --repair ;;
*) echo "usage: $0 scale|end|proximal|repair" >&2 && exit 2 ;;
esac
