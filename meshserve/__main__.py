"""`python -m meshserve`: the same as the `meshserve` command."""

from meshserve.cli import main

if __name__ == "__main__":
    main()
