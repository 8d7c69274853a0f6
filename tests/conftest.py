"""For all tests: nothing here may start a second thread before ranks are forked."""

import os

# A process that ever ran a multi-threaded tensor op can't be forked: its children hang. So it never runs one.
os.environ["OMP_NUM_THREADS"] = "1"
