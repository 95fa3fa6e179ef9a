#!/usr/bin/env bash
# Split-, Rotated- and Permuted-MNIST, all 60,000 images: results/mnist.md.
#
#     results/mnist.sh    # conv.yaml, 2 epochs; Split- takes 24 minutes on one core of an Intel Xeon with AMX,
#                         # Rotated- 84 and Permuted- 101 on one of an AMD EPYC (family 26)
#
# From the environment also TASKS (split rotated permuted). See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
for tasks in ${TASKS:-split rotated permuted}; do
  runs=()
  for seed in $SEEDS; do
    flags=(--data_config "config/dataset/${tasks}_mnist.yaml" --hp_config config/hyperparam/conv.yaml
           --epochs "${EPOCHS:-2}" --seed "$seed")
    run modelzoo.py "$tasks-isolated-$seed" "${flags[@]}" --continual --tasks_per_round 1
    run modelzoo.py "$tasks-zoo-$seed" "${flags[@]}" --continual
    run modelzoo.py "$tasks-zoo-inherit-$seed" "${flags[@]}" --continual --inherit
    run multihead.py "$tasks-joint-$seed" "${flags[@]}"
    for kind in isolated zoo zoo-inherit joint; do runs+=("$OUT/$tasks-$kind-$seed"); done
  done
  "$PYTHON" tools/report.py "${runs[@]}" --format markdown
done
