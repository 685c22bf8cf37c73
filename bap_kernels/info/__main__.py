"""``python -m bap_kernels.info`` prints the facts of this installation."""

from bap_kernels.info import info

if __name__ == "__main__":
    print(info())
