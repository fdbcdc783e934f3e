"""Train the classifier: ``python train.py dataset=cutouts``, the same as ``lpcam train``."""

from lpcam.programs.train import main

if __name__ == "__main__":
    main()
