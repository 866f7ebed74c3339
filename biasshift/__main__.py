"""``python -m biasshift`` is the command line."""

from biasshift.cli import main

if __name__ == "__main__":
    main()
