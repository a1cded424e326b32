#!/bin/sh
# Opens the app, for people who do not use a terminal: double-click it (macOS), or run it (Linux).
# The first time, it makes an environment beside itself, .venv, and installs everything into it.
#
#   PIP_ARGS=...   passed on to pip, for example an index of torch for AMD's GPUs
#
# Arguments are those of `dora-diffusion app`.

cd -- "$(dirname -- "$0")" || exit 1
# A window that was opened by a double click does not always have these.
PATH="$PATH:/opt/homebrew/bin:/usr/local/bin"

find_python() {
    for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
        found=$(command -v "$name") || continue
        # Without Apple's developer tools this one only asks to install them.
        if [ "$found" = /usr/bin/python3 ] && [ "$(uname)" = Darwin ]; then continue; fi
        "$found" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && return
    done
    return 1
}

code=1
if find_python; then
    "$found" tools/start_app.py "$@"
    code=$?
else
    echo 'Python 3.10 or later is missing. Install it, then start again:'
    echo '  macOS:           https://www.python.org/downloads/macos/'
    echo '  Debian, Ubuntu:  sudo apt install python3 python3-venv'
fi
if [ "$code" -ne 0 ]; then
    printf '\nThis did not work (exit code %s): the lines above say why. Press Enter to close.' "$code"
    read -r _
fi
exit "$code"
