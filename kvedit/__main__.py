"""`python -m kvedit`: the same as the installed `kvedit` command."""

from kvedit.cli import main

if __name__ == "__main__":
    main()
