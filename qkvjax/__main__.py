"""`python -m qkvjax COMMAND`, the same as `qkvjax COMMAND`."""

from qkvjax.commands.cli import entry

if __name__ == "__main__":
    entry()
