"""What the tests of all engines and examples have in common."""

import os


# Real models share the machine with other tests. NumPy's threads that wait for a core make it many
# times slower than one thread is. Read when NumPy is imported, so this comes first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
