"""For the interpreters that tests start: a quarter of the time of their imports is garbage collection."""

import gc

gc.set_threshold(50_000)
