#!/usr/bin/env bash
# From nothing to a trained, evaluated model and a report: real text that every machine has, all four stages, two cores.
# Usage: bash launch/quickstart.sh [section.field=value ...]   (overrides go to every verb)

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" quickstart

config=configs/quickstart.py
davinci curate "$config" "$@"
davinci shard "$config" --new-tokenizer "$@"
davinci plan "$config" "$@"
davinci train "$config" "$@"
davinci generate "$config" --save "$@"
davinci report "$config" "$@"
