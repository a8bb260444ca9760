#!/bin/sh
# FedBiOT taken apart (docs/strategies.md): the small model, four data owners, eight rounds of 8 steps, LoRA of rank 8 in
# the last two blocks (placement=any: in the first and the last), half of the other blocks dropped. One line for each
# setting: perplexity of the full model, of the emulator as it is handed out and tuned, and of the plug-in. From the
# repository root, after `make pico`; a quarter of an hour on 2 cores.
set -eu
for options in "realign=-1,epsilon=0" "realign=-1" "realign=-1,epsilon=0.1" "realign=0,first-steps=200" \
    "first-steps=200" "first-steps=200,epsilon=0" "first-steps=200,lambda-kl=0" "placement=any,realign=-1,epsilon=0"; do
    case "$options" in placement=any*) split=1-1 ;; *) split=0-2 ;; esac
    out="runs/fedbiot/$(echo "$options" | tr ',=' '__')"
    mkdir -p runs/fedbiot
    [ -f "$out/report.csv" ] || python -m simulations.demo --model pico --out "$out" --set "split=$split" \
        --set emulator=layer-drop:keep=0.5 --set tune.lora-rank=8 --set tune.lr=1e-2 --set baseline.run=false \
        --set "strategy=fedbiot:$options" >"$out.log" 2>&1
    python - "$options" "$out" <<'PY'
import sys
from pathlib import Path

from offsite_fl.evaluation.record import RunReport

rows = RunReport.read(Path(sys.argv[2])).rows
shown = [rows.full_zero_shot, rows.emulator_zero_shot, rows.emulator_tuned, rows.plug_in]
print("|", f"`{sys.argv[1]}`", "|", " | ".join(f"{row.perplexity:.2f}" for row in shown), "|", flush=True)
PY
done
