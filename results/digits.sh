#!/usr/bin/env bash
# The picture at the top of the README, results/figures/digits.png, and its table, results/digits.md, from nothing:
# Model Zoo and Isolated beside Avalanche's Naive, Replay, EWC and A-GEM on five tasks of rotated digits, three seeds.
#
#     results/digits.sh            # needs requirements-peers.txt; a second call makes only what is missing
#
# PYTHON: which Python (python); OUT: where the run folders go (runs/digits); SEEDS: which seeds (0 1 2).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-runs/digits} SEEDS=${SEEDS:-0 1 2} FIGURE=${FIGURE:-results/figures/digits.png}
TABLE=${TABLE:-results/digits.md}
DIGITS="--data_config config/dataset/rotated_digits.yaml --hp_config config/hyperparam/small.yaml --samples 20
        --device cpu --precision fp32 --out $OUT --resume"
for seed in $SEEDS; do
  $PYTHON modelzoo.py $DIGITS --seed $seed --continual --name zoo-$seed
  $PYTHON modelzoo.py $DIGITS --seed $seed --continual --tasks_per_round 1 --name isolated-$seed
  $PYTHON tools/peers.py naive replay ewc agem $DIGITS --seed $seed
done
RUNS="$OUT/zoo-* $OUT/isolated-* $OUT/*avalanche-replay* $OUT/*avalanche-agem* $OUT/*avalanche-ewc* $OUT/*avalanche-naive*"
$PYTHON tools/plot.py methods $RUNS --file "$FIGURE"
{
  echo "# Rotated digits, Model Zoo beside Avalanche's methods"
  echo
  echo "Made by \`results/digits.sh\`, which makes the figure too. EWC's weight is not tuned (1)."
  echo
  $PYTHON tools/report.py $RUNS --format markdown
} > "$TABLE"
echo "$FIGURE and $TABLE are written"
