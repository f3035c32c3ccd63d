"""``python -m paddledsv4``."""

from paddledsv4.cli import main

if __name__ == "__main__":
    main()
