#!/usr/bin/env bash
# The tables of results/peers.md: beside Avalanche's methods. Needs requirements-peers.txt.
#
#     results/peers.sh    # a day on one core of an AMD EPYC
#
# See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
peers=" ${PEERS-naive joint replay agem ewc} "
for data in coarse split; do
  if [ $data = coarse ]; then
    flags=(--data_config config/dataset/coarse_cifar100.yaml) weights="1 10" memory=1000  # with 100 training diverges
  else
    flags=(--data_config config/dataset/split_mnist.yaml --samples 1000) weights="1 100" memory=200
  fi
  all=()
  for seed in $SEEDS; do
    common=("${flags[@]}" --hp_config config/hyperparam/conv.yaml --epochs 5 --seed "$seed")
    for method in ${peers/ ewc / }; do  # first: it says so if Avalanche is missing
      more=()
      case $method in replay | agem | der) more=(--memory "$memory") ;; esac
      run "tools/peers.py $method" "$data-avalanche-$method-$seed" "${common[@]}" "${more[@]}"
    done
    run modelzoo.py "$data-zoo-$seed" "${common[@]}" --continual
    run modelzoo.py "$data-little-$seed" "${common[@]}" --continual --replay_frac 0.02
    run modelzoo.py "$data-isolated-$seed" "${common[@]}" --continual --tasks_per_round 1
    run multihead.py "$data-joint-$seed" "${common[@]}"
    for kind in zoo little isolated joint; do all+=("$OUT/$data-$kind-$seed"); done
    for method in ${peers/ ewc / }; do all+=("$OUT/$data-avalanche-$method-$seed"); done
    if [[ $peers == *" ewc "* ]]; then
      for weight in $weights; do
        run "tools/peers.py ewc" "$data-ewc$weight-$seed" "${common[@]}" --ewc_lambda "$weight"
        all+=("$OUT/$data-ewc$weight-$seed")
      done
    fi
  done
  "$PYTHON" tools/report.py "${all[@]}" --format markdown
done
