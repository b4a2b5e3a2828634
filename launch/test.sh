#!/usr/bin/env bash
# Everything that must hold before a change lands: style, then the tests, about eight minutes on two cores.
# Usage: bash launch/test.sh [fast | exhaustive | parity | aot]
#   fast        the subset that takes a minute
#   exhaustive  all there is: every kernel in its interpreter and for every device
#   parity      recomputes the recorded references with torch and transformers (installs them)
#   aot         only the kernels compiled ahead of time for TPUs and the H200, a part of which the others run too
#
# The compilers for those devices live in an environment of their own, .venv-aot: where libtpu or the CUDA plugin is
# installed without its device, every start of jax complains.

group=${1:-all}
case "$group" in
  all | fast | exhaustive | parity | aot) ;;
  *) echo "launch/test.sh: unknown group '$group'; choose fast, exhaustive, parity or aot, or leave it out for all" >&2; exit 2 ;;
esac
extras=test
if [ "$group" = parity ]; then extras=test,parity; fi
if [ "$group" = exhaustive ]; then extras=test,curation-ray; fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$extras"

# A file's tests share its runs and its compiled programs, so they stay on one worker.
parallel=(-n 2 --dist loadfile --no-loadscope-reorder)

compile_ahead_of_time() {
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "launch/test.sh: no compilers for TPUs and the H200 on $(uname -sm); their tests are left out" >&2
    return
  fi
  (
    VENV=.venv-aot make_environment aot
    python -m pytest -n 2 --dist worksteal -m "$1" tests/pallas_kernels/aot
  )
}

check_style() {
  ruff check .
  ruff format --check -q .
}

case "$group" in
  fast) check_style; pytest "${parallel[@]}" -m "not slow and not exhaustive and not parity" ;;
  # Compiled as a user's programs are; tests/conftest.py has the compiler hurry otherwise.
  exhaustive) export JAX_DISABLE_MOST_OPTIMIZATIONS=0; check_style; pytest "${parallel[@]}" --timeout 1800 -m "not parity"; compile_ahead_of_time "exhaustive or not exhaustive" ;;
  parity) check_style; pytest -m parity ;;
  aot) compile_ahead_of_time "exhaustive or not exhaustive" ;;
  all) check_style; pytest "${parallel[@]}" -m "not exhaustive and not parity"; compile_ahead_of_time "not exhaustive" ;;
esac
