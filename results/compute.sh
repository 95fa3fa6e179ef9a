#!/usr/bin/env bash
# Accuracy against compute, parameters and rows stored: results/figures/compute.png, which the README shows.
#
#     results/compute.sh    # four days on one core of an AMD EPYC; EPOCHS="1 5" SHORT="2": one; EPOCHS= SHORT=10: an hour or two
#
# From the environment also SHORT, the lengths of the methods that are cheap (2 10 40 80; those of EPOCHS as well), WIDE,
# those of the wider network, ISOLATED, the seeds of Isolated and of Multi-Head (0 1 2 3; every four of them make an
# average), and FIGURE, the file that is written. Needs requirements-peers.txt. See results/common.sh.
# The numbers of the figure go to $OUT/compute.csv; results/compute.csv holds those that the README's is drawn from:
#
#     python tools/plot.py compute results/compute.csv --file results/figures/compute.png
. "$(dirname "$0")/common.sh" || exit
all=(${EPOCHS-1 5 20}) short=(${SHORT-2 10 40 80})
wide=(${WIDE-${all[@]}}) isolated=(${ISOLATED:-0 1 2 3})
mkdir -p "$OUT"
# As many parameters as the whole zoo of 20 learners, 2.5 M.
sed 's/^model: conv$/model: conv_361/' config/hyperparam/conv.yaml > "$OUT/wide.yaml"
data=(--data_config config/dataset/coarse_cifar100.yaml)
conv=("${data[@]}" --hp_config config/hyperparam/conv.yaml)
runs=() ensembles=()
for epochs in "${all[@]}"; do
  for seed in $SEEDS; do
    for method in ${PEERS-replay}; do  # first: it says so if Avalanche is missing
      run "tools/peers.py $method" "$method-e$epochs-$seed" "${conv[@]}" --epochs "$epochs" --seed "$seed"
    done
  done
done
for epochs in "${all[@]}" "${short[@]}"; do
  for seed in $SEEDS; do
    flags=("${conv[@]}" --epochs "$epochs" --seed "$seed")
    run modelzoo.py "isolated-inherit-e$epochs-$seed" "${flags[@]}" --continual --tasks_per_round 1 --inherit
    runs+=("$OUT/isolated-inherit-e$epochs-$seed")
  done
  for seed in "${isolated[@]}"; do
    flags=("${conv[@]}" --epochs "$epochs" --seed "$seed")
    run modelzoo.py "isolated-e$epochs-$seed" "${flags[@]}" --continual --tasks_per_round 1
    run multihead.py "joint-e$epochs-$seed" "${flags[@]}"
    runs+=("$OUT/isolated-e$epochs-$seed" "$OUT/joint-e$epochs-$seed")
  done
  for kind in isolated joint; do
    for ((i = 0; i + 4 <= ${#isolated[@]}; i += 4)); do
      ensembles+=(--ensemble)
      for seed in "${isolated[@]:i:4}"; do ensembles+=("$OUT/$kind-e$epochs-$seed"); done
    done
  done
done
for epochs in "${all[@]}"; do
  for seed in $SEEDS; do
    flags=("${conv[@]}" --epochs "$epochs" --seed "$seed")
    run modelzoo.py "zoo-inherit-e$epochs-$seed" "${flags[@]}" --continual --inherit
    run modelzoo.py "zoo-e$epochs-$seed" "${flags[@]}" --continual
    runs+=("$OUT/zoo-inherit-e$epochs-$seed" "$OUT/zoo-e$epochs-$seed")
    for method in ${PEERS-replay}; do runs+=("$OUT/$method-e$epochs-$seed"); done
  done
done
for epochs in "${wide[@]}"; do
  for seed in $SEEDS; do
    run multihead.py "wide-e$epochs-$seed" "${data[@]}" --hp_config "$OUT/wide.yaml" --epochs "$epochs" --seed "$seed"
    runs+=("$OUT/wide-e$epochs-$seed")
  done
done
"$PYTHON" tools/plot.py compute "${runs[@]}" "${ensembles[@]}" --file "$OUT/compute.csv"
"$PYTHON" tools/plot.py compute "$OUT/compute.csv" --file "${FIGURE:-results/figures/compute.png}"
"$PYTHON" tools/report.py "${runs[@]}" "${ensembles[@]}" --format markdown
