#!/usr/bin/env bash
# Installs a lock into a virtual environment, which it makes if there is none:
#
#   requirements/install.sh VENV LOCK [more arguments of pip install, such as -e .]
#
# Makefile, cluster.yaml and platform/image/Dockerfile all install this way. Variables:
#
#   PYTHON       interpreter of a new environment, 3.11 or 3.12 (default: the first one on PATH)
#   TORCH_INDEX  index to try for the CPU build of torch when pip's own sources lack it, as they do
#                unless configured (default: PyTorch's; empty: none)
set -euo pipefail

venv=$1 lock=$2
shift 2
python=$venv/bin/python
torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

fail() {
  echo "$*" >&2
  exit 1
}

make_venv() {
  local candidate found=''
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
    then
      found=$candidate
      break
    fi
  done
  [[ $found ]] || fail "pathflip needs Python 3.11 or 3.12 and found neither. Install one (Debian," \
    "Ubuntu: apt install python3.11 python3.11-venv) or name it: PYTHON=/path/to/python3.11."
  "$found" -c 'import ensurepip, venv' 2>/dev/null || fail "$found has no venv module. Install it" \
    "(Debian, Ubuntu: apt install" \
    "$("$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))."
  echo "Making $venv with $("$found" --version)."
  "$found" -m venv --clear "$venv"
}

"$python" -c '' 2>/dev/null || make_venv
"$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null

# No bytecode: Python writes it at the first import, and most modules are never imported. Compiling
# them all took three quarters of the install (docs/notes/performance.md; requirements/bytecode.py).
#
# uv takes a fifth of pip's time. It is the one on PATH, or the lock's own, which pip installs first.
# It reads none of pip's settings: uv_options.py translates them, and where it cannot, pip installs.
installer=pip from=--index-url sources=()
install() { "$python" -m pip --disable-pip-version-check install --no-deps --no-compile "$@"; }

settings=$("$python" -m pip config list)
if options=$("$python" "${BASH_SOURCE[0]%/*}/uv_options.py" <<<"$settings"); then
  pin=$(grep '^uv=' "$lock" || true)
  uv=$(command -v uv || true)
  if [[ ! $uv && $pin ]] && install -q "$pin"; then
    uv=$venv/bin/uv
  fi
  if [[ $uv ]]; then
    installer=uv from=--default-index
    mapfile -t sources < <(printf '%s' "$options")
    cert=$(sed -n "s/^[^=]*\.cert='\(.*\)'$/\1/p" <<<"$settings" | tail -n 1)
    [[ ! $cert ]] || export SSL_CERT_FILE=$cert
    install() {
      local given=() option
      for option in "${sources[@]}"; do  # an index that is given replaces pip's
        [[ " $* " == *" $from "* && $option == "$from="* ]] || given+=("$option")
      done
      "$uv" pip install --python "$python" --no-deps "${given[@]}" "$@"
    }
  fi
fi
echo "Installing the versions pinned in $lock with $installer (once, some minutes)."

# With === a pin means that very build: ==2.13.0 would take 2.13.0+cpu as well.
exact=$(sed 's/==/===/' "$lock")
torch=$(grep '^torch=' <<<"$exact")
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# torch goes first: it is what may not be found, and the answer should come before all the rest.
if ! install "$torch" >"$log" 2>&1; then
  grep -qE 'No matching distribution found|No solution found' "$log" || fail "$(<"$log")"
  echo "$installer found no $torch." >&2
  [[ $torch == *+cpu ]] || fail "$(<"$log")"  # other builds are on no index of their own
  [[ $torch_index ]] && echo "Trying $torch_index." && install "$from" "$torch_index" "$torch" ||
    fail "No $torch to be had. Set PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS or TORCH_INDEX to where" \
      "PyTorch's CPU wheels are and run this again (docs/howto/install.md)."
fi
grep -v '^torch=' <<<"$exact" | install -r /dev/stdin |
  sed '/^Requirement already satisfied/d'
(($# == 0)) || install --no-build-isolation "$@" >"$log" 2>&1 || fail "$(<"$log")"
