#!/usr/bin/env bash
# Which inheritance? On a fifth of the training rows held out, no test row: results/inherit.md, "Which inheritance".
#
#     results/variants.sh    # conv.yaml, 5 epochs; 5.2 hours on one core of an AMD EPYC
#
# From the environment also WAYS, which of the ways. See results/common.sh.
. "$(dirname "$0")/common.sh" || exit
[ -e "$OUT/data/cifar100.npz" ] || "$PYTHON" results/variants.py hold_out "${DATA_DIR:-data}" "$OUT/data"
DATA_DIR=$OUT/data
flags=(--continual --data_config config/dataset/coarse_cifar100.yaml --hp_config config/hyperparam/conv.yaml
       --epochs "${EPOCHS:-5}")
runs=()
for seed in $SEEDS; do
  run modelzoo.py "chain-$seed" "${flags[@]}" --seed "$seed" --inherit
  run modelzoo.py "weighed-$seed" "${flags[@]}" --seed "$seed" --inherit --weigh_by_round
  run modelzoo.py "fresh-$seed" "${flags[@]}" --seed "$seed"
  for way in ${WAYS:-star perturb-0.8 perturb-0.4 heads rate-0.3}; do
    run "results/variants.py $way" "$way-$seed" "${flags[@]}" --seed "$seed" --inherit --save_nets
  done
done
for way in fresh chain weighed ${WAYS:-star perturb-0.8 perturb-0.4 heads rate-0.3}; do
  for seed in $SEEDS; do runs+=("$OUT/$way-$seed"); done
done
"$PYTHON" results/variants.py members "${runs[@]}"
