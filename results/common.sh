# Read by the other scripts here. From the environment they take
#   PYTHON    which Python (python)
#   DATA_DIR  where the data lie (data)
#   OUT       where the run folders go (runs/<the script's name>)
#   SEEDS     of the runs (0 1 2)
#   EPOCHS    where a script trains for one length, or for several
#   PEERS     where a script runs Avalanche's methods, which of them; "" for none
#   MORE      flags for every run, such as "--samples 5 --epochs 1", which give another table sooner
# Relative paths count from the repository.
# A script that is started again goes on: only what is missing is run. Two shells share the work, each with other SEEDS
# and, where a script takes them, other ISOLATED.
set -eu
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PYTHON=${PYTHON:-python} SEEDS=${SEEDS:-0 1 2} MORE=${MORE:-} OUT=${OUT:-runs/$(basename "$0" .sh)}

run() { # FILE NAME FLAGS...: one run, which a folder of that name keeps
  local file=$1 name=$2
  shift 2
  # shellcheck disable=SC2086  # MORE holds several words
  "$PYTHON" $file --data_dir "${DATA_DIR:-data}" --out "$OUT" --name "$name" --resume "$@" $MORE
}
