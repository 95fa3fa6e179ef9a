#!/usr/bin/env bash
# The tables of results/coarse_cifar100.md, and results/figures/seen.png and bars.png.
#
#     results/coarse_cifar100.sh                # a day on one core of an AMD EPYC
#     PARTS="small" results/coarse_cifar100.sh  # one table: small draw conv5 conv20 why multitask
#
# From the environment also FIGURES, the folder of the figures, and ISOLATED, the seeds of Isolated (0 to 11). See
# results/common.sh.
. "$(dirname "$0")/common.sh" || exit
coarse=(--data_config config/dataset/coarse_cifar100.yaml)
small=("${coarse[@]}" --hp_config config/hyperparam/small.yaml)
isolated=(${ISOLATED:-0 1 2 3 4 5 6 7 8 9 10 11})
figures=${FIGURES:-results/figures}
mkdir -p "$OUT"

# runs KIND...: the folders of these kinds, all seeds; ensembles KIND: an average of every four Isolated networks.
runs() { for kind in "$@"; do for seed in $SEEDS; do echo "$OUT/$kind-$seed"; done; done; }
singles() { for seed in "${isolated[@]}"; do echo "$OUT/$1-$seed"; done; }
ensembles() {
  for ((i = 0; i + 4 <= ${#isolated[@]}; i += 4)); do
    echo --ensemble
    for seed in "${isolated[@]:i:4}"; do echo "$OUT/$1-$seed"; done
  done
}

known="small draw conv5 conv20 why multitask"
parts=(${PARTS:-$known})
for part in "${parts[@]}"; do
  if [[ " $known " != *" $part "* ]]; then
    echo "coarse_cifar100.sh: PARTS: $part is not one of ${known// /, }" >&2
    exit 2
  fi
done
for part in "${parts[@]}"; do
  case $part in
  small)
    for seed in $SEEDS; do
      run modelzoo.py "zoo-$seed" "${small[@]}" --continual --num_rounds 15 --seed "$seed"
      run modelzoo.py "inherit-$seed" "${small[@]}" --continual --num_rounds 15 --inherit --seed "$seed"
      run multihead.py "joint15-$seed" "${small[@]}" --num_tasks 15 --seed "$seed"
    done
    for seed in "${isolated[@]}"; do
      run modelzoo.py "isolated-$seed" "${small[@]}" --continual --num_rounds 15 --tasks_per_round 1 --seed "$seed"
    done
    mapfile -t all < <(runs zoo inherit isolated)
    "$PYTHON" tools/plot.py seen "${all[@]}" --file "$figures/seen.png"
    mapfile -t all < <(runs zoo inherit; singles isolated; runs joint15; ensembles isolated)
    "$PYTHON" tools/plot.py dots "${all[@]}" --file "$figures/bars.png"
    ;;
  draw)  # the draw, the tasks a round, limited replay
    for seed in $SEEDS; do
      zoo=("${small[@]}" --continual --num_rounds 15 --seed "$seed")
      run modelzoo.py "zoo-$seed" "${zoo[@]}"
      run modelzoo.py "naive-$seed" "${zoo[@]}" --naive
      for n in 2 10; do run modelzoo.py "tasks$n-$seed" "${zoo[@]}" --tasks_per_round "$n"; done
      for r in 0.05 0.1 0.5; do run modelzoo.py "replay$r-$seed" "${zoo[@]}" --replay_frac "$r"; done
    done
    mapfile -t all < <(runs zoo naive tasks2 tasks10 replay0.05 replay0.1 replay0.5)
    ;;
  conv5 | conv20)
    conv=("${coarse[@]}" --hp_config config/hyperparam/conv.yaml --epochs "${part#conv}")
    for seed in $SEEDS; do
      run modelzoo.py "$part-zoo-$seed" "${conv[@]}" --continual --seed "$seed"
      run multihead.py "$part-joint-$seed" "${conv[@]}" --seed "$seed"
    done
    for seed in "${isolated[@]}"; do
      run modelzoo.py "$part-isolated-$seed" "${conv[@]}" --continual --tasks_per_round 1 --seed "$seed"
    done
    mapfile -t all < <(runs "$part-zoo"; singles "$part-isolated"; runs "$part-joint"; ensembles "$part-isolated")
    ;;
  why)  # why the gap shrinks: annealing, augmentation
    sed 's/^schedule: constant/schedule: cosine/' config/hyperparam/small.yaml > "$OUT/cosine.yaml"
    sed 's/^augment: false/augment: true/' config/hyperparam/small.yaml > "$OUT/augmented.yaml"
    for change in cosine augmented; do
      for seed in $SEEDS; do
        zoo=("${coarse[@]}" --hp_config "$OUT/$change.yaml" --continual --num_rounds 15 --seed "$seed")
        run modelzoo.py "$change-zoo-$seed" "${zoo[@]}"
        run modelzoo.py "$change-inherit-$seed" "${zoo[@]}" --inherit
        run modelzoo.py "$change-isolated-$seed" "${zoo[@]}" --tasks_per_round 1
      done
    done
    mapfile -t all < <(runs cosine-zoo cosine-inherit cosine-isolated augmented-zoo augmented-inherit augmented-isolated)
    ;;
  multitask)
    for seed in $SEEDS; do
      run multihead.py "mt-joint-$seed" "${small[@]}" --samples 100 --seed "$seed"
      run modelzoo.py "mt-zoo-$seed" "${small[@]}" --samples 100 --seed "$seed"  # 10 rounds of 10 tasks
      for n in 5 10; do  # as many Multi-Heads
        run modelzoo.py "mt-joint$n-$seed" "${small[@]}" --samples 100 --seed "$seed" --num_rounds "$n" --tasks_per_round 20
      done
    done
    mapfile -t all < <(runs mt-zoo mt-joint mt-joint5 mt-joint10)
    ;;
  esac
  "$PYTHON" tools/report.py "${all[@]}" --format markdown
done
