#!/usr/bin/env bash
# The picture at the top of the README, results/figures/digits.png, and its table, results/digits.md, from nothing:
# Model Zoo and Isolated beside Avalanche's Naive, Replay, EWC and A-GEM on five tasks of rotated digits, three seeds.
#
#     results/digits.sh    # seven minutes on one core; needs requirements-peers.txt; again: only what is missing
#
# From the environment: PYTHON, which Python (python); OUT, where the run folders go (runs/digits); SEEDS (0 1 2);
# FIGURE and TABLE, the files that are written.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PYTHON=${PYTHON:-python} OUT=${OUT:-runs/digits}
FIGURE=${FIGURE:-results/figures/digits.png} TABLE=${TABLE:-results/digits.md}
for seed in ${SEEDS:-0 1 2}; do
  flags=(--data_config config/dataset/rotated_digits.yaml --hp_config config/hyperparam/small.yaml --samples 20
         --device cpu --precision fp32 --out "$OUT" --resume --seed "$seed")
  "$PYTHON" tools/peers.py naive replay ewc agem "${flags[@]}"  # first: it says so if Avalanche is missing
  "$PYTHON" modelzoo.py --continual "${flags[@]}" --name "zoo-$seed"
  "$PYTHON" modelzoo.py --continual "${flags[@]}" --tasks_per_round 1 --name "isolated-$seed"
done
runs=("$OUT"/zoo-* "$OUT"/isolated-*)
for method in replay agem ewc naive; do runs+=("$OUT"/*-avalanche-"$method"-*); done
"$PYTHON" tools/plot.py methods "${runs[@]}" --file "$FIGURE"
report=$("$PYTHON" tools/report.py "${runs[@]}" --format markdown)
cat > "$TABLE" <<END
# Rotated digits: Model Zoo beside Avalanche's methods

Made by \`results/digits.sh\`, the figure too. Replay and A-GEM store every row, as the zoo does; EWC's weight is
1, not tuned.

$report
END
echo "$FIGURE and $TABLE are written"
