"""What all examples have in common."""

import os


# They share the machine with other tests: see tests/engines/conftest.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
