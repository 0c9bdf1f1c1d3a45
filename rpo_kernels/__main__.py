"""Command line: `python -m rpo_kernels audit | verify | traffic | tune | info | hub`."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "audit": "compile every kernel for real chips, with no GPU: registers, accesses, instructions "
    "per element",
    "verify": "run every kernel here against the float64 reference, beside PyTorch's own error",
    "traffic": "bytes that each kernel reads and writes, counted, against the cost model and "
    "naive PyTorch",
    "tune": "choose launch settings for your vocabularies: on a GPU by the clock, without by "
    "machine code",
    "info": "versions, devices, backends, launch settings",
    "hub": "write the package as a kernel of the Hugging Face kernels hub",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rpo_kernels", description="Check the kernels on your own machine."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".tools.{name}", __package__)
        command = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
