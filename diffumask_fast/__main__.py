"""The program: `python -m diffumask_fast`, and what is installed as diffumask-fast."""

import signal


def main() -> None:
    """Run the command line; stopped while it loads, it ends at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # as an exception, Ctrl-C could be swallowed by a library that tries whether it can import another
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from diffumask_fast.cli import main as run

    run()


if __name__ == "__main__":
    main()
