"""The command line: `python -m bench <command> [Hydra overrides]`."""

import sys

from bench.errors import Stopped, TrajectoryFailed, UserError

COMMANDS = {
    "prepare": "read or download a corpus, tokenize it and write shards",
    "train": "train one trajectory, or with -m every trajectory of a study",
    "status": "show how each trajectory of a study stands",
    "gains": "turn finished runs, or a table of results, into compute-equivalent gains and a report",
    "report": "write the report of a study's gains again, and with --wandb to Weights & Biases",
    "wandb-sync": "upload what Weights & Biases lacks of a study's trajectories",
    "speed": "check and time what this project made fast, beside its peers",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    examples = [
        "  python -m bench train -m study=quickstart",
        "  python -m bench gains study=quickstart",
        "  python -m bench gains data=table path=results.csv output=gains",
    ]
    return "\n".join(["usage: python -m bench <command> [Hydra overrides]", "", *lines, "", "for example:", *examples])


def main(arguments: list[str]) -> int:
    """Runs a command; returns the exit status: 0, 1 where trajectories failed, 2 for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    command, *overrides = arguments
    if command not in COMMANDS:
        print(f"error: no command {command!r}: choose {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from bench import commands

    try:
        return getattr(commands, command.replace("-", "_"))(overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrajectoryFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print("stopped by a signal: the same command goes on from here", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoints", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
