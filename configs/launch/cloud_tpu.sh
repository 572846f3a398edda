#!/bin/bash
# Trains on a Cloud TPU slice, one process on each host; JAX finds the other hosts in the cloud's metadata. Run it on a machine
# with gcloud, from the checkout:
#     ZONE=us-east5-b BUCKET=my-bucket bash configs/launch/cloud_tpu.sh configs/gsm8k_llama3.1_8b.yaml
# Put HF_TOKEN=... before it to read gated models. The last commit is sent to the hosts: commit your YAML file first. Settings after
# the YAML file override it. The same command, given again, continues from the last checkpoint. The slice costs money until you run
#     gcloud compute tpus tpu-vm delete grpo --zone "$ZONE"
set -euo pipefail
ZONE=${ZONE:?the zone, such as us-east5-b}
BUCKET=${BUCKET:?the bucket that the run is written to}
NAME=${NAME:-grpo} TYPE=${TYPE:-v6e-16} VERSION=${VERSION:-v2-alpha-tpuv6e}
config=${1:?a YAML file}
shift

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" >/dev/null 2>&1 ||
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$VERSION"
git archive --format=tar.gz --output=grpo-source.tar.gz HEAD
gcloud compute tpus tpu-vm scp grpo-source.tar.gz "$NAME":source.tar.gz --zone "$ZONE" --worker=all
on_all_hosts "mkdir -p grpo && tar -xzf source.tar.gz -C grpo"
# The image's Python may be 3.10, which is too old.
on_all_hosts "python3 -m pip install -q uv && (test -d venv || python3 -m uv venv --python 3.12 venv)"
on_all_hosts "python3 -m uv pip install -q --python venv/bin/python -e 'grpo[tpu]'"
# Storage that all hosts share: the run folder needs it.
on_all_hosts "mkdir -p shared && (mountpoint -q shared || gcsfuse --implicit-dirs $BUCKET shared)"
train="../venv/bin/python -m grpo_jax train --config $config --train.run_dir ../shared/runs/$NAME --train.quiet true --resume $*"
on_all_hosts "cd grpo && HF_TOKEN=${HF_TOKEN:-} $train"
