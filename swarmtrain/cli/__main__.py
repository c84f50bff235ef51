"""`python -m swarmtrain.cli`, where the installed command is not on the path."""

from swarmtrain.cli.main import main

if __name__ == "__main__":
    main()
