# What two commands of the pages do differently here. The rest is what it is.

# Nothing is installed: what the line names has to be there already, and its extras to be ours.
pip() { python "$CHECKOUT/tests/docs/pip.py" "$@"; }

# The environment is there already, whatever it is called. What would take minutes, or run these
# tests within themselves, is only looked up.
make() {
    local dry=()
    case " $* " in *" test "* | *" bench "* | *" soak "* | *" lint "* | *" docs "*) dry=(--dry-run) ;; esac
    command make --directory "$CHECKOUT" --no-print-directory --assume-old .venv/.run \
        BIN="$(dirname "$(command -v python)")" ${dry[@]+"${dry[@]}"} "$@" \
        | if [ ${#dry[@]} -gt 0 ]; then cat >/dev/null; else cat; fi
    return "${PIPESTATUS[0]}"
}

# On a terminal it shows no progress when its answer goes there; these are not on one.
curl() { command curl --silent --show-error "$@"; }
