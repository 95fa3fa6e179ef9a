#!/usr/bin/env bash
# The table of results/batch_norm.md, its columns "after"; copied with common.sh into a checkout of commit 668cf5c it gives
# those "before".
#
#     results/batch_norm.sh    # two hours on one core of an AMD EPYC
#
# See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
small=(--hp_config config/hyperparam/small.yaml --continual --device cpu --precision fp32)
for data in "rotated_digits --samples 5" "rotated_digits --samples 20" "coarse_cifar100 --num_rounds 15"; do
  read -r file flag value <<< "$data"
  all=()
  for seed in $SEEDS; do
    flags=(--data_config "config/dataset/$file.yaml" "${small[@]}" "$flag" "$value" --seed "$seed")
    run modelzoo.py "zoo-$file-$value-$seed" "${flags[@]}"
    run modelzoo.py "isolated-$file-$value-$seed" "${flags[@]}" --tasks_per_round 1
    all+=("$OUT/zoo-$file-$value-$seed" "$OUT/isolated-$file-$value-$seed")
  done
  "$PYTHON" tools/report.py "${all[@]}" --format markdown
done
