"""``python -m pccl.tools``: the same as ``pccl``."""

from pccl.tools.cli import main

if __name__ == "__main__":
    main()
