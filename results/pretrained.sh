#!/usr/bin/env bash
# What weights learned on half of CIFAR-100's classes are worth on the other half: results/pretrained.md.
#
#     results/pretrained.sh    # conv.yaml, 5 epochs; an hour and a half on one core of an AMD EPYC
#
# One network learns the first ten coarse tasks together for 20 epochs (FIRST). The last ten are then learned from
# scratch, from its backbone, and on its backbone as it stays; and, as it stays, once more from folders of PNG files. The
# weights and the folders are written below DATA_DIR; a second shell may share the work once they are there. See
# results/common.sh.
. "$(dirname "$0")/common.sh" || exit
mkdir -p "$OUT"
coarse=config/dataset/coarse_cifar100.yaml conv=config/hyperparam/conv.yaml
first=$OUT/first_cifar100.yaml last=$OUT/last_cifar100.yaml folders=$OUT/folders_cifar100.yaml
awk '/^[a-z]/ {n = 0} !/^  - / || ++n <= 10' $coarse > "$first"  # ten of the tasks and ten of the names
awk '/^[a-z]/ {n = 0} !/^  - / || ++n > 10' $coarse > "$last"
sed '/\[/s/[0-9][0-9]*/c&/g; s|^dataset:.*|dataset: image_folder\npath: cifar100_png\nsize: 32|' "$last" > "$folders"
(cat $conv; echo "weights: first_half.pt") > "$OUT/tuned.yaml"
(cat "$OUT/tuned.yaml"; echo "freeze: true") > "$OUT/frozen.yaml"
run modelzoo.py first --data_config "$first" --hp_config $conv --epochs "${FIRST:-20}" --num_rounds 1 \
  --tasks_per_round 10 --save_nets
"$PYTHON" results/pretrained.py "$OUT/first" "${DATA_DIR:-data}"
runs=()
for seed in $SEEDS; do
  for start in frozen tuned scratch; do
    hp=$OUT/$start.yaml
    [ $start = scratch ] && hp=$conv
    flags=(--data_config "$last" --hp_config "$hp" --epochs "${EPOCHS:-5}" --seed "$seed" --continual)
    run modelzoo.py "$start-isolated-$seed" "${flags[@]}" --tasks_per_round 1
    run modelzoo.py "$start-zoo-$seed" "${flags[@]}"
    runs+=("$OUT/$start-isolated-$seed" "$OUT/$start-zoo-$seed")
    [ $start = frozen ] && continue
    run modelzoo.py "$start-inherit-$seed" "${flags[@]}" --inherit
    runs+=("$OUT/$start-inherit-$seed")
  done
  run modelzoo.py "folders-isolated-$seed" --data_config "$folders" --hp_config "$OUT/frozen.yaml" \
    --epochs "${EPOCHS:-5}" --seed "$seed" --continual --tasks_per_round 1
  runs+=("$OUT/folders-isolated-$seed")
done
"$PYTHON" tools/report.py "${runs[@]}" --format markdown
