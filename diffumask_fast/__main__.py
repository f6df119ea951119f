"""The program: `python -m diffumask_fast`, and what is installed as diffumask-fast."""

import sys


def main() -> None:
    """Run the command line; stopped while it loads, it ends as it does later."""
    try:
        from diffumask_fast.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
