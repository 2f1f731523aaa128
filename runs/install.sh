# Sourced by the other scripts: `source runs/install.sh EXTRA` makes and enters .venv unless an environment is active,
# and installs nanollm with that extra ("" for none). A second run finds everything there and takes a second.
EXTRA="${1:-}"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    PYTHON=""
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then PYTHON="$candidate"; break; fi
    done
    if [ -z "$PYTHON" ]; then echo "error: Python 3.11 or newer is needed; install it from python.org" >&2; exit 2; fi
    if [ ! -f .venv/pyvenv.cfg ]; then
        echo "making a virtual environment in .venv"
        "$PYTHON" -m venv .venv
    fi
    MADE_VENV=1
    if [ -f .venv/bin/activate ]; then source .venv/bin/activate; else source .venv/Scripts/activate; fi
fi
STAMP="$(python -c 'import sys; print(sys.prefix)')/nanollm-installed-${EXTRA:-core}"
if [ ! -f "$STAMP" ] || [ pyproject.toml -nt "$STAMP" ]; then
    echo "installing nanollm${EXTRA:+ with the extra '$EXTRA'}"
    python -m pip install --quiet --disable-pip-version-check -e ".${EXTRA:+[$EXTRA]}"
    touch "$STAMP"
fi
