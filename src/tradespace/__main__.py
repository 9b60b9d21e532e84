"""`python -m tradespace …` is `tradespace …`. Nothing is imported before Ctrl-C has an answer: the rest takes a while to load."""

import sys


def main() -> None:
    """The command line, with exit code 130 for Ctrl-C at any moment."""
    try:
        from tradespace.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
