# Sourced by the other scripts: makes .venv from requirements.lock, once, and puts it first on PATH.

lgp_environment() {
    local stamp=.venv/lgp-stamp python candidate
    local wanted
    wanted=$(cat pyproject.toml requirements.lock | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        python=
        for candidate in python3 python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "lgp: no Python 3.11, 3.12 or 3.13 with the module venv was found: install one and try again." >&2
            return 2
        fi
        echo "Installing into .venv (about two minutes, 6 GB) ..."
        if [ -L .venv ]; then rm .venv; fi  # --clear would empty the folder of another checkout
        "$python" -m venv --clear .venv
        .venv/bin/python -m pip install --quiet --progress-bar off --require-hashes -r requirements.lock
        .venv/bin/python -m pip install --quiet --progress-bar off --no-deps --no-build-isolation -e .
        echo "$wanted" > "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}
