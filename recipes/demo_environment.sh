# Sourced by the demos, which run ordinary commands of this project with it, each printed before it starts.
export TOKENIZERS_PARALLELISM=false

# Threads sleep while they wait for each other. Spinning threads take the cores from the thread they wait for as soon
# as another program runs: docs/performance.md has the figures.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

step() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}
