"""python -m pathflip.cli is the command pathflip."""

from pathflip.cli import main

if __name__ == "__main__":
    main()
