"""`python -m commonweight` is the `commonweight` command."""

from commonweight.cli.main import main

if __name__ == "__main__":
    main()
