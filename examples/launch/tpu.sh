#!/bin/bash
# GRPO on a TPU slice of sixteen hosts, v5p-128: `bash examples/launch/tpu.sh`.
#
# Asks for the slice, waits until it is there, installs the package on every host, and starts the
# same command on all at once; `--coordinator auto` lets JAX find the hosts by the slice's metadata.
# Models and runs are in a bucket that every host mounts.
set -euo pipefail

: "${PROJECT:?name a project of Google Cloud}" "${ZONE:?such as us-east5-a}" "${BUCKET:?a bucket for runs}"
NAME=${NAME:-grpo}
TYPE=${TYPE:-v5p-128}

gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --project "$PROJECT" --zone "$ZONE" \
  --accelerator-type "$TYPE" --runtime-version v2-alpha-tpuv5

state() {
  gcloud compute tpus queued-resources describe "$NAME" --project "$PROJECT" --zone "$ZONE" --format "value(state.state)"
}
until [ "$(state)" = ACTIVE ]; do sleep 60; done

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project "$PROJECT" --zone "$ZONE" --worker all --command "$1"
}
on_all "pip install 'rlhf[tpu]' && mkdir -p ~/bucket && gcsfuse --implicit-dirs $BUCKET ~/bucket"
on_all "rlhf grpo --coordinator auto \
  --model Qwen/Qwen2.5-7B-Instruct --dataset ~/bucket/gsm8k --columns '{question: prompt, answer: solution}' --reward accuracy \
  --batch_size 32 --num_samples 8 --data 4 --fsdp 16 --dtype bfloat16 --remat full \
  --save_every 50 --output ~/bucket/runs/grpo"
