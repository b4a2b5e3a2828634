# Sourced by the other scripts: makes .venv with the project and the given extras, once for each state of setup.cfg.
# Usage: source launch/environment.sh EXTRAS     (for example: quickstart,test)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "launch: Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python3 bash $0" >&2
  return 1
}

make_environment() {
  local extras=$1 venv=${VENV:-.venv} python stamp
  python=$(find_python)
  stamp="$(cksum < setup.cfg) $("$python" --version)"
  if ! grep -qxF "$extras: $stamp" "$venv/.installed" 2>/dev/null; then
    echo "launch: installing the project [$extras] into $venv (a few minutes the first time)"
    if command -v uv >/dev/null; then
      [ -x "$venv/bin/python" ] || uv venv -q --python "$python" "$venv"
      uv pip install -q --python "$venv/bin/python" -e ".[$extras]"
    else
      if [ ! -x "$venv/bin/pip" ] && ! "$python" -m venv "$venv"; then
        echo "launch: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
      fi
      "$venv/bin/pip" install -q --disable-pip-version-check -e ".[$extras]"
    fi
    echo "$extras: $stamp" >> "$venv/.installed"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
}

make_environment "$1"
