# What .ci/run and .ci/full share; to be sourced.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What a developer's shell may have set must not decide here.
unset INFERENCIA_E2E_LLAMA_URL INFERENCIA_TEST_LOOP INFERENCIA_SLOW INFERENCIA_KILLS PYTHONPATH VIRTUAL_ENV
engines=${INFERENCIA_E2E_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/inferencia-e2e}
unset INFERENCIA_E2E_DIR

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

# A hung test shows all its stacks and ends the run instead of using up its time.
hung='-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true'

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo 'Python 3.11 or newer is needed' >&2
  return 1
}

# A copy of what is in the repository: builds leave nothing behind in the checkout, and
# a file that somebody forgot to add is missed here, not by the first user.
copy_sources() {
  mkdir -p "$work/source"
  if git -C "$repository" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    (cd "$repository" && git ls-files -z | tar --null -T - -cf -) | tar -xf - -C "$work/source"
  else
    (cd "$repository" && tar --exclude=.venv -cf - .) | tar -xf - -C "$work/source"
  fi
  cd "$work/source"
}

# The one line of README.md that begins with $1.
readme_command() {
  local found
  found=$(grep -F -- "$1" README.md | grep -E '^(python3|\.venv)') || found=
  if [ "$(printf '%s' "$found" | grep -c .)" != 1 ]; then
    echo "README.md has not exactly one command with: $1" >&2
    return 1
  fi
  printf '%s\n' "$found"
}

# The Pythons on PATH and in pyenv that are of another minor version than .venv's, and that
# the package is for; one of each.
other_pythons() {
  local minor own python
  own=$(.venv/bin/python -c 'import sys; print(sys.version_info.minor)')
  for minor in 11 12 13 14 15; do
    if [ "$minor" = "$own" ]; then continue; fi
    for python in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
      # (A shim of pyenv's is there for versions, too, that are not switched on.)
      if "$python" -c 'import ensurepip, sqlite3, ssl' 2>/dev/null; then
        command -v "$python"
        break
      fi
    done
  done
}

make_venv() { "$(find_python)" -m venv .venv; }

install_engines() { .venv/bin/python tests/engines/install.py "$engines"; }

# Reverse proxies, for the tests that stand behind real ones. Those tests are skipped
# where a program is missing, so this may fail.
install_proxies() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        nginx-light caddy haproxy openssl >/dev/null ||
      echo 'no proxies from Debian; their tests are skipped'
  fi
}

# A browser and its driver, for the tests of the page; they are skipped without.
install_browser() {
  if command -v chromedriver >/dev/null; then return; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        chromium chromium-driver fonts-dejavu-core >/dev/null ||
      echo 'no browser from Debian; the tests of the page are skipped'
  fi
}

# What builds the container image without Docker; it is not built without.
install_image_tools() {
  if which buildah podman runc debootstrap >/dev/null; then return; fi # all of them
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        buildah podman runc debootstrap >/dev/null ||
      echo 'no buildah from Debian; the image is not built'
  fi
}
