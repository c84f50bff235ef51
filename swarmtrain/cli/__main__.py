"""`python -m swarmtrain.cli`: the command where the installed one is not on the path."""

from swarmtrain.cli.main import main

if __name__ == "__main__":
    main()
