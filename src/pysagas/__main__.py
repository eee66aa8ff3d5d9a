"""``python -m pysagas``: a saga against a real database, to watch, break, kill and interrupt."""

from ._demo import main

if __name__ == "__main__":
    raise SystemExit(main())
