"""`python -m deployments.command_line` is `overnight`."""

from deployments.command_line import main

if __name__ == "__main__":
    main()
