#!/usr/bin/env bash
# What the parts of a zoo are worth, on 100 images a class: the tables of results/parts.md and results/figures/joint.png.
#
#     results/parts.sh    # half a day on one core of an AMD EPYC
#
# From the environment also FIGURES, the folder of the figure. See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
small=(--data_config config/dataset/coarse_cifar100.yaml --hp_config config/hyperparam/small.yaml --samples 100)
isolated=(${ISOLATED:-0 1 2 3 4 5 6 7 8 9 10 11})
all=() joint=() ensembles=()
for seed in $SEEDS; do
  zoo=("${small[@]}" --continual --num_rounds 15 --seed "$seed")
  run modelzoo.py "zoo-$seed" "${zoo[@]}"
  run modelzoo.py "naive-$seed" "${zoo[@]}" --naive
  run modelzoo.py "two-$seed" "${zoo[@]}" --tasks_per_round 2
  run modelzoo.py "ten-$seed" "${zoo[@]}" --tasks_per_round 10
  run modelzoo.py "replay-$seed" "${zoo[@]}" --replay_frac 0.1
  for kind in zoo naive two ten replay; do all+=("$OUT/$kind-$seed"); done
  for n in 1 2 5 10 15; do
    run multihead.py "joint$n-$seed" "${small[@]}" --num_tasks "$n" --seed "$seed"
    joint+=("$OUT/joint$n-$seed")
  done
  all+=("$OUT/joint15-$seed")
done
for seed in "${isolated[@]}"; do
  run modelzoo.py "isolated-$seed" "${small[@]}" --continual --num_rounds 15 --tasks_per_round 1 --seed "$seed"
  all+=("$OUT/isolated-$seed")
done
for ((i = 0; i + 4 <= ${#isolated[@]}; i += 4)); do
  ensembles+=(--ensemble)
  for seed in "${isolated[@]:i:4}"; do ensembles+=("$OUT/isolated-$seed"); done
done
"$PYTHON" tools/plot.py joint "${joint[@]}" --file "${FIGURES:-results/figures}/joint.png"
"$PYTHON" tools/report.py "${all[@]}" "${ensembles[@]}" --format markdown
for d in split rotated permuted; do
  all=()
  for seed in $SEEDS; do
    mnist=(--data_config "config/dataset/${d}_mnist.yaml" --hp_config config/hyperparam/conv.yaml --epochs 5
           --samples 100 --seed "$seed")
    run modelzoo.py "$d-zoo-$seed" "${mnist[@]}" --continual
    run modelzoo.py "$d-inherit-$seed" "${mnist[@]}" --continual --inherit
    run modelzoo.py "$d-isolated-$seed" "${mnist[@]}" --continual --tasks_per_round 1
    run modelzoo.py "$d-isolated-inherit-$seed" "${mnist[@]}" --continual --tasks_per_round 1 --inherit
    run multihead.py "$d-joint-$seed" "${mnist[@]}"
    for kind in zoo inherit isolated isolated-inherit joint; do all+=("$OUT/$d-$kind-$seed"); done
  done
  "$PYTHON" tools/report.py "${all[@]}" --format markdown
done
