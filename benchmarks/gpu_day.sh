#!/usr/bin/env bash
# Runs all benchmarks on a borrowed GPU, stage by stage. Each stage appends JSONL and, if it
# succeeds, leaves a stamp. Stages with a stamp are skipped, so that an interrupted run continues.
#
#   bash benchmarks/gpu_day.sh [RESULTS]         RESULTS: a folder, by default benchmarks/results
#   MINI=1 bash benchmarks/gpu_day.sh RESULTS    the same stages in miniature, on a CPU
#   STAGES="correctness train_124m_xla" ...      only these stages
#   PREPARE=FOLDER bash benchmarks/gpu_day.sh    lowers kernels for an H200, on any machine with
#                                                the same version of jax as that with the GPU
#   PREPARED=FOLDER bash benchmarks/gpu_day.sh   uses these lowered kernels, which saves minutes
#   TEXT=PATH BPE=FOLDER ...                     also runs a model at full size on a text
#
# Needs no network. Uses $PYTHON (by default python3) with jax, flax, optax, orbax-checkpoint,
# ml-collections, grain and tensorflow-datasets; PyTorch is used if it is installed. Each stage
# should take less than 9 minutes and is stopped after 9.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$results/stamps"

if [ -n "${PREPARE:-}" ]; then
    "$python" benchmarks/correctness.py --prepare="$PREPARE" || exit
    for part in ops caches tiles splits; do
        "$python" benchmarks/kernel_speed.py --part=$part --prepare="$PREPARE" || exit
    done
    exit
fi

if ! missing=$("$python" - <<'PY'
import importlib.util, sys
names = ("jax", "flax", "optax", "orbax.checkpoint", "ml_collections", "grain", "tensorflow_datasets",
         "matplotlib", "tensorboardX", "tqdm")
def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
missing = [name for name in names if not installed(name)]
print(" ".join(missing))
sys.exit(bool(missing))
PY
); then
    echo "error: $python lacks $missing: install them or set PYTHON" >&2
    exit 2
fi

if [ -n "${MINI:-}" ]; then
    export JAX_PLATFORMS=cpu
    small=tiny
    large=tiny
    ours=reference
    dtype=float32
    lengths="64"
    batches="2"
    widths="16"
    correct=(--length=64 --widths=16)
    parts="ops caches"
    mini=1
    compile=0
    bench=(--config=configs/lm.py:depth=1 --config.data.seq_len=16 --config.data.batch_size=2
        --contexts=16 --batches=2)
    study=("--config=configs/quickstart.py:steps=2,seeds=1" --config.model.d_model=16
        --config.data.seq_len=16 --config.evals.eval.max_labels=200
        --config.evals.eval_train.max_labels=200
        "--config.study.points=({'model.sharing': 'q-k-v'}, {'model.sharing': 'q-k=v'})")
else
    small=124m
    large=350m
    ours=auto
    dtype=bfloat16
    lengths="2048 32768"
    batches="1 32"
    widths="64 128 256"
    correct=()
    parts="ops caches tiles splits"
    mini=0
    compile=1
    bench=(--config=configs/lm.py:depth=12 --config.model.num_heads=32 --config.model.num_kv_heads=8
        --config.train.compute_dtype=bfloat16 --config.data.seq_len=4096 --contexts=16384
        --config.data.batch_size=1 --batches=8)
    study=(--config=configs/quickstart.py)
fi
failed=0

# stage NAME COMMAND...: runs a command unless it is done or not in STAGES; logs to NAME.log.
stage() {
    local name=$1 code
    shift
    case " ${STAGES:-$name} " in *" $name "*) ;; *) return ;; esac
    if [ -e "$results/stamps/$name" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    timeout 540 "$@" >"$results/$name.log" 2>&1
    code=$?
    tail -n 5 "$results/$name.log"
    if [ $code = 0 ]; then
        touch "$results/stamps/$name"
    else
        echo "== $name ended with code $code: see $results/$name.log" >&2
        failed=1
    fi
}

stage environment "$python" -c "
import json
from qkvjax.parallel import host
print(json.dumps(host.environment()))
open('$results/environment.jsonl', 'a').write(json.dumps(host.environment()) + '\n')"
prepared=${PREPARED:-}
stage correctness "$python" benchmarks/correctness.py "${correct[@]}" --prepared="$prepared" \
    --output="$results/correctness.jsonl"
for part in $parts; do
    stage "$part" "$python" benchmarks/kernel_speed.py --part="$part" --mini=$mini \
        --prepared="$prepared" --output="$results/$part.jsonl"
done
for size in $small $large; do
    for attention in xla $ours; do
        stage "train_${size}_$attention" "$python" benchmarks/train_speed.py --size="$size" \
            --dtype=$dtype --attention="$attention" --output="$results/train_speed.jsonl"
    done
    if "$python" -c 'import torch' 2>/dev/null; then
        stage "twin_$size" "$python" benchmarks/torch_twin.py --size="$size" --dtype=$dtype \
            --compile="$compile" --output="$results/torch_twin.jsonl"
    else
        echo "== twin_$size: skipped, $python has no PyTorch"
    fi
done
for length in $lengths; do
    for batch in $batches; do
        stage "decode_${batch}_$length" "$python" benchmarks/decode_speed.py --size=$small \
            --dtype=$dtype --batch="$batch" --length="$length" --output="$results/decode_speed.jsonl"
    done
done
for width in $widths; do
    for what in decode kernels; do
        stage "${what}_$width" "$python" -m qkvjax bench $what "${bench[@]}" \
            --config.model.head_dim="$width" --workdir="$results/bench_$width"
    done
done
# A model at full size through every command.
if [ -n "${TEXT:-}" ]; then
    full=(--text="$TEXT" --dtype=$dtype --workdir="$results/full_size"
        --output="$results/full_size.jsonl")
    if [ -n "${MINI:-}" ]; then
        full+=(--config=configs/lm.py:depth=1 --labels=512)
    else
        full+=(--bpe="${BPE:?BPE names a folder with GPT-2 encoder.json and vocab.bpe}" --rows=64
            --micro_batches=2 --steps=100)
    fi
    stage full_size "$python" benchmarks/full_size.py "${full[@]}"
fi
stage study "$python" -m qkvjax study "${study[@]}" --workdir="$results/study"
echo "results in $results"
exit $failed
