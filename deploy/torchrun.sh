#!/usr/bin/env bash
# Train on several machines that no scheduler looks after. Run the same command on each of them:
#
#   HEAD=gpu0.example NODES=2 deploy/torchrun.sh \
#       --config configs/ms1m_iresnet100.yaml --run-folder /shared/runs/ms1m
#
# The run folder, the data and the configuration lie where all machines see them under one path.
# A process that dies is started again with all others, and the run goes on from its last
# checkpoint. If a machine is lost, repeat the command on it, or on another in its place; if HEAD
# is lost, repeat it on all.
set -euo pipefail

: "${HEAD:?set HEAD to the name or address of one of the machines, the same on all}"
NODES=${NODES:-2}                 # machines
RANKS=${RANKS:-auto}              # processes a machine; auto: one a GPU, or one a CPU core
PORT=${PORT:-29500}               # of HEAD, open to the others
RESTARTS=${RESTARTS:-10}          # before torchrun gives up
RUN_ID=${RUN_ID:-sphereface2}     # two runs at a time need two names and two ports

# A machine that joins again must be told where the others are.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN_ID" \
    --max-restarts "$RESTARTS" \
    -m sphereface2 fit --head.sharded true --training.autocast bf16 "$@"
