# Sourced by the demos to print and run ordinary commands of this project.
export TOKENIZERS_PARALLELISM=false

# Threads sleep while they wait for each other. If another program runs, spinning threads take the cores from the thread they
# wait for: docs/performance.md has measurements.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

step() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}
