#!/usr/bin/env bash
# The paper's network, WRN-16-4, on Coarse-CIFAR100: results/wrn.md.
#
#     results/wrn.sh               # 3 epochs; a zoo takes 101 minutes on one core of an Intel Xeon with AMX, Multi-Head 24
#     EPOCHS=100 results/wrn.sh    # the paper's size, for a GPU
#
# From the environment also ZOOS, the seeds of the two zoos (0). See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
runs=()
for seed in $SEEDS; do
  flags=(--data_config config/dataset/coarse_cifar100.yaml --hp_config config/hyperparam/wrn.yaml
         --epochs "${EPOCHS:-3}" --seed "$seed")
  run modelzoo.py "isolated-$seed" "${flags[@]}" --continual --tasks_per_round 1
  run modelzoo.py "isolated-inherit-$seed" "${flags[@]}" --continual --tasks_per_round 1 --inherit
  run multihead.py "joint-$seed" "${flags[@]}"
  runs+=("$OUT/isolated-$seed" "$OUT/isolated-inherit-$seed" "$OUT/joint-$seed")
done
for seed in ${ZOOS:-0}; do
  flags=(--data_config config/dataset/coarse_cifar100.yaml --hp_config config/hyperparam/wrn.yaml
         --epochs "${EPOCHS:-3}" --seed "$seed")
  run modelzoo.py "zoo-inherit-$seed" "${flags[@]}" --continual --inherit
  run modelzoo.py "zoo-$seed" "${flags[@]}" --continual
  runs+=("$OUT/zoo-inherit-$seed" "$OUT/zoo-$seed")
done
"$PYTHON" tools/report.py "${runs[@]}" --format markdown
