#!/usr/bin/env bash
# The picture at the top of the README, results/figures/digits.png, and its table, results/digits.md: Model Zoo, with and
# without --inherit, and Isolated beside Avalanche's Naive, Replay, EWC and A-GEM on five tasks of rotated digits.
#
#     results/digits.sh    # ten minutes on one core; needs requirements-peers.txt
#
# From the environment also FIGURE and TABLE, the files that are written. See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
table=${TABLE:-results/digits.md}
digits=(--data_config config/dataset/rotated_digits.yaml --hp_config config/hyperparam/small.yaml --samples 20
        --device cpu --precision fp32)
runs=()
for seed in $SEEDS; do
  for method in ${PEERS-replay agem ewc naive}; do  # first: it says so if Avalanche is missing
    run "tools/peers.py $method" "$method-$seed" "${digits[@]}" --seed "$seed"
  done
  run modelzoo.py "zoo-$seed" "${digits[@]}" --seed "$seed" --continual
  run modelzoo.py "inherit-$seed" "${digits[@]}" --seed "$seed" --continual --inherit
  run modelzoo.py "isolated-$seed" "${digits[@]}" --seed "$seed" --continual --tasks_per_round 1
done
for kind in zoo inherit isolated ${PEERS-replay agem ewc naive}; do
  for seed in $SEEDS; do runs+=("$OUT/$kind-$seed"); done
done
"$PYTHON" tools/plot.py methods "${runs[@]}" --file "${FIGURE:-results/figures/digits.png}"
report=$("$PYTHON" tools/report.py "${runs[@]}" --format markdown)
cat > "$table" <<END
# Rotated digits: Model Zoo beside Avalanche's methods

Made by \`results/digits.sh\`, the figure too. Replay and A-GEM store every row, as the zoo does; EWC's weight is
1, not tuned.

$report
END
echo "$table is written"
