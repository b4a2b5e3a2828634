#!/usr/bin/env bash
# Everything that must hold before a change lands: style, then the tests (all but those that need torch).
# Usage: bash launch/test.sh [fast | parity]
#   fast    the subset that takes about a minute
#   parity  recomputes the recorded references with torch and transformers (installs them)

extras=test
if [ "${1:-}" = parity ]; then extras=test,parity; fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$extras"

ruff check .
ruff format --check -q .
case "${1:-all}" in
  fast) pytest -n 2 -m "not slow and not parity" ;;
  parity) pytest -m parity ;;
  all) pytest -n 2 -m "not parity" ;;
  *) echo "launch/test.sh: unknown group '$1'; choose fast or parity, or leave it out for all" >&2; exit 2 ;;
esac
