"""python -m pathflip.cli is the command pathflip."""

from pathflip.cli import run

if __name__ == "__main__":
    run()
