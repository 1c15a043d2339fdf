"""``python -m lit_sparse``."""

from lit_sparse.cli.main import main

if __name__ == "__main__":
    main()
