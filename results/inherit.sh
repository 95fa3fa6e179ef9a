#!/usr/bin/env bash
# Fresh starts against learners that inherit, and against averages of Isolated networks: results/inherit.md, first table.
#
#     results/inherit.sh             # conv.yaml, 5 epochs; six hours on one core of an AMD EPYC
#     EPOCHS=20 results/inherit.sh
#
# Isolated is trained with seeds 0 to 11 (ISOLATED) for three ensembles of four. See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
epochs=${EPOCHS:-5} runs=() ensembles=() isolated=(${ISOLATED:-0 1 2 3 4 5 6 7 8 9 10 11})
flags=(--continual --data_config config/dataset/coarse_cifar100.yaml --hp_config config/hyperparam/conv.yaml
       --epochs "$epochs")
for seed in $SEEDS; do
  run modelzoo.py "zoo-inherit-e$epochs-$seed" "${flags[@]}" --seed "$seed" --inherit
  run modelzoo.py "zoo-e$epochs-$seed" "${flags[@]}" --seed "$seed"
  run modelzoo.py "isolated-inherit-e$epochs-$seed" "${flags[@]}" --seed "$seed" --tasks_per_round 1 --inherit
  runs+=("$OUT/zoo-inherit-e$epochs-$seed" "$OUT/zoo-e$epochs-$seed" "$OUT/isolated-inherit-e$epochs-$seed")
done
for seed in "${isolated[@]}"; do
  run modelzoo.py "isolated-e$epochs-$seed" "${flags[@]}" --seed "$seed" --tasks_per_round 1
  runs+=("$OUT/isolated-e$epochs-$seed")
done
for ((i = 0; i + 4 <= ${#isolated[@]}; i += 4)); do
  ensembles+=(--ensemble)
  for seed in "${isolated[@]:i:4}"; do ensembles+=("$OUT/isolated-e$epochs-$seed"); done
done
"$PYTHON" tools/report.py "${runs[@]}" "${ensembles[@]}" --format markdown
