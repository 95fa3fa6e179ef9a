#!/usr/bin/env bash
# Does the order of the tasks matter, with and without --inherit? results/inherit.md, the table of orders.
#
#     results/orders.sh    # conv.yaml, 5 epochs, three orders: 18 runs, each 10 minutes on one core of an AMD EPYC (family 26)
#
# From the environment also ORDERS (0 1 2; 0 is the file's). See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
all=()
for order in ${ORDERS:-0 1 2}; do
  runs=()
  for seed in $SEEDS; do
    flags=(--continual --data_config config/dataset/coarse_cifar100.yaml --hp_config config/hyperparam/conv.yaml
           --epochs "${EPOCHS:-5}" --seed "$seed" --task_order "$order")
    run modelzoo.py "inherit-$order-$seed" "${flags[@]}" --inherit
    run modelzoo.py "fresh-$order-$seed" "${flags[@]}"
    runs+=("$OUT/inherit-$order-$seed" "$OUT/fresh-$order-$seed")
  done
  "$PYTHON" tools/report.py "${runs[@]}" --format markdown  # this order alone, over seeds
  all+=("${runs[@]}")
done
"$PYTHON" tools/report.py "${all[@]}" --format markdown
