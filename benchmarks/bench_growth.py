"""How time and memory of a run grow: with its length, T, the number of images, processes, and parameters.

    python benchmarks/bench_growth.py run_length [--steps 20000]
    python benchmarks/bench_growth.py rows
    python benchmarks/bench_growth.py chain [--rounds 15]
    python benchmarks/bench_growth.py images [--rows 1000 10000 100000 1000000]
    python benchmarks/bench_growth.py processes
    python benchmarks/bench_growth.py parameters [--rounds 9]

Each prints a table of at least four points with a fitted slope and its 95 % interval, most of them of the logarithms:
the exponent p of time ~ size**p. Seconds are those of the processor unless the table says otherwise, since other load
changes them less, medians of rounds in which all sizes take turns in reversed order; one thread. The tables are in
docs/scale.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Print the tables of one subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    length = commands.add_parser("run_length")
    length.add_argument("--steps", type=int, default=20_000)
    length.add_argument("--folder", type=Path, help="where the run is kept")
    rows = commands.add_parser("rows")
    rows.add_argument("--steps", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    chain = commands.add_parser("chain")
    chain.add_argument("--rounds", type=int, default=15)
    chain.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    images = commands.add_parser("images")
    images.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    images.add_argument("--folder", type=Path, help="where the images are kept")
    images.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    processes = commands.add_parser("processes")
    processes.add_argument("--work", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parameters = commands.add_parser("parameters")
    parameters.add_argument("--rounds", type=int, default=9)
    parameters.add_argument("--of", type=int, help=argparse.SUPPRESS)
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Run one command; the modules are imported here, so that a measured process loads no other."""
    match arguments.command:
        case "run_length":
            from growth import run_length

            run_length.main(arguments.steps, arguments.folder)
        case "rows":
            from growth import rows

            rows.main(arguments.steps)
        case "chain":
            from growth import chain

            chain.print_own_memory(arguments.memory_of) if arguments.memory_of else chain.main(arguments.rounds)
        case "images":
            from growth import images

            if arguments.measure:
                images.measure(*arguments.measure)
            else:
                images.main(arguments.rows, arguments.folder)
        case "processes":
            from growth import processes

            processes.main() if arguments.work is None else processes.work(arguments.work)
        case "parameters":
            from growth import parameters

            parameters.measure(arguments.of) if arguments.of else parameters.main(arguments.rounds)


if __name__ == "__main__":
    main()
