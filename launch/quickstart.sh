#!/usr/bin/env bash
# From nothing to a trained, evaluated model and a report: real text that every machine has, all four stages, about five
# minutes on two cores; a busy machine takes several times as long.
# Usage: bash launch/quickstart.sh [section.field=value ...]   (overrides go to every verb)

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" quickstart

# A run that is interrupted has saved where it was; what follows would show a model that is half trained.
trap 'echo "quickstart: stopped; the same command continues"; exit 130' INT TERM

# glibc gives the step's buffers back to the system after each step and has them zeroed again for the next: keeping
# them makes a step about 15 % faster on a CPU (benchmarks/results/training_cpu.md).
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

config=configs/quickstart.py
echo "quickstart: about five minutes on two cores, several times that on a busy machine"
davinci curate "$config" "$@"
davinci shard "$config" --new-tokenizer "$@"
davinci plan "$config" "$@"
davinci train "$config" "$@"
davinci generate "$config" --save "$@"
davinci report "$config" "$@"
echo "to use the command yourself: export PATH=\"$PWD/${VENV:-.venv}/bin:\$PATH\""
