# shellcheck shell=bash
# Sourced by the launch scripts: installs qkvjax into a virtual environment, once.
#
#   make_environment FOLDER EXTRAS     sets $python to the interpreter of the environment
#
# Uses $PYTHON, or python3 (3.11 or newer). The file FOLDER/qkvjax-stamp records setup.cfg, the
# extras and the version of Python; where one of them has changed, the environment is made anew.

make_environment() {
    local folder=$1 extras=$2 base=${PYTHON:-python3} version stamp wanted
    if ! version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'); then
        echo "error: qkvjax needs Python 3.11 or newer but $base is ${version:-not found}: set PYTHON=/path/to/python3" >&2
        return 2
    fi
    stamp=$folder/qkvjax-stamp
    wanted="$version $extras $(cat setup.cfg pyproject.toml | cksum) $PWD"
    python=$PWD/$folder/bin/python
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$python" -c '' 2>/dev/null; then
        return 0
    fi
    echo "installing qkvjax${extras:+[$extras]} into $folder (Python $version)"
    rm -rf "$folder"
    "$base" -m venv "$folder" || {
        echo "error: $base cannot make a virtual environment: install its venv module" >&2
        return 2
    }
    "$python" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" || {
        echo "error: the installation failed; the lines above say why" >&2
        rm -rf "$folder"
        return 2
    }
    echo "$wanted" >"$stamp"
}
