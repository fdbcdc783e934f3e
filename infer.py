"""Make maps and masks: ``python infer.py prototypes.k=12``, the same as ``lpcam infer``."""

from lpcam.programs.infer import main

if __name__ == "__main__":
    main()
